"""All that this project changes for the whole process and not only for itself: global settings of libraries, patches.

One function for each, called from where its library is imported; nothing is loaded before. What depends on names that
a library may change checks them first, and raises MissingExtra, with the versions, where they have changed. Four
effects stay with their subjects: importing `reinforce.store.bfloat16` teaches zarr that data type; commands and
trainings take SIGINT and SIGTERM (`signals.py`); a training seeds torch at every step (`train/objective.py`); Ray is
started from the folder of our packages (`run/cluster.py`).
"""

import ctypes
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

from reinforce.errors import MissingExtra

# What the tests pass with: the versions of constraints.txt.
CHECKED = {"numcodecs": "0.16.6", "open_clip_torch": "3.3.0", "torchvision": "0.28.0", "zarr": "3.1.6"}
_TEXT_TOWER = ["embed_dim", "text_cfg", "quick_gelu", "cast_dtype"]
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_declared: list[Any] = []  # torch withdraws operators when the library that declared them is collected


def blosc_in_one_thread() -> None:
    """numcodecs: Blosc's threads put compressed blocks down in the order they finish, so that the same array would give
    other bytes. Setting a name that is not read would do nothing, so it is checked."""
    import numcodecs.blosc

    if not hasattr(numcodecs.blosc, "use_threads"):
        raise changed("numcodecs", "blosc.use_threads", "the bytes of a store would depend on timing")
    numcodecs.blosc.use_threads = False


def zarr_without_warnings() -> None:
    """zarr warns at every use of pcodec that Zarr's specification does not have it, which docs/store.md says once."""
    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr version 3 specification")


def pillow_without_warnings() -> None:
    """Pillow warns of odd metadata, which is no fault of the pixels. `catch_warnings` is not safe in threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def pillow_without_half_images() -> None:
    """Pillow takes half an image for a whole one where any library has set this. Called before each image."""
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False


def give_memory_back() -> None:
    """glibc keeps what a thread has freed for that thread, and so a picture's memory for each thread that decodes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim:
        trim(0)


def keep_memory() -> None:
    """glibc gives what torch frees back to the machine at once, where it is large, and at the next batch the machine
    must clear every page of it anew: a quarter of the time that small models take on a CPU. Blocks of 16 MB and more,
    which Pillow has of large pictures, and what is free beyond 64 MB still go back. Who has set glibc otherwise is left
    alone."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if adjust and not any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")):
        adjust(_M_MMAP_THRESHOLD, 16 << 20)
        adjust(_M_TRIM_THRESHOLD, 64 << 20)


def timm_without_warnings() -> None:
    """timm warns of how open_clip builds its models, which a user of a teacher can do nothing about."""
    logging.getLogger("timm").setLevel(logging.ERROR)


def torch_threads(num: int) -> None:
    """torch: sums are split among its threads, so that on a CPU their number decides the last bits."""
    import torch

    torch.set_num_threads(num)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Afterwards torch has as many threads as before."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def errors_only() -> Iterator[None]:
    """For a while no library logs anything below an error: open_clip warns of missing weights that nobody asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def end_loader_workers(iterator: object) -> None:
    """torch: the workers of a DataLoader end when its iterator is collected. An exception on its way out keeps that
    alive, and Python waits for them before it exits: for ever, where they ignore signals. Without workers there is
    nothing to do."""
    end = getattr(iterator, "_shutdown_workers", None)
    if end:
        end()


def full_float32() -> None:
    """torch on CUDA: float32 is rounded to TF32 in cuDNN's convolutions where nobody forbids it. What a manifest calls
    fp32 is fp32."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def package_without_init(name: str, folders: list[str]) -> Iterator[None]:
    """For a while, modules of package `name` can be imported although its `__init__` cannot run: mamba-ssm's wants a
    compiled extension that its Triton kernels do without."""
    bare = ModuleType(name)
    bare.__path__ = folders
    sys.modules[name] = bare
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def ray_environment() -> None:
    """Ray reads this when it is imported: it sends no usage statistics where the user does not ask for them, shows no
    traceback of a call whose worker was given up, and runs workers of a private Ray no nicer than this process. At its
    own niceness of 15 they starve beside anything else that computes: models were loaded in 44 s instead of 7."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextmanager
def model_packages() -> Iterator[None]:
    """For an import of what needs torchvision. Raises MissingExtra where a package is not installed."""
    try:
        import_torchvision()
        yield
    except MissingExtra:
        raise
    except ImportError as error:
        raise MissingExtra.of_models(error.name or str(error)) from error


def import_torchvision() -> None:
    """Import torchvision, which must work on a CPU build of torch, too.

    The wheel of the package index is linked to CUDA's torch. On a CPU torch its compiled operators silently do not
    load, and its import then fails while it describes two of them. Declaring these two is enough for its parts in
    Python, which are all that open_clip and timm use. Elsewhere this does nothing.
    """
    try:
        import torchvision

        return
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    import torch

    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        del sys.modules[module]
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in _OPERATORS:
        library.define(operator)
    _declared.append(library)
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        raise changed("torchvision", "operators nms and qnms only", f"its import fails: {error}") from error


def open_clip_text_tower(model: ModuleType, build: Callable[..., Any]) -> Callable[..., Any]:
    """open_clip has no way to add a kind of text tower, so `model`, its module of this name, is made to call `build`.

    Gives open_clip's own function, which `build` may call.
    """
    own: Callable[..., Any] | None = getattr(model, "_build_text_tower", None)
    if own is None or [*inspect.signature(own).parameters] != _TEXT_TOWER:
        name = f"model._build_text_tower({', '.join(_TEXT_TOWER)})"
        raise changed("open_clip_torch", name, "MobileCLIP's text tower cannot be added to it")
    model._build_text_tower = build  # type: ignore[attr-defined]
    return own


def changed(package: str, name: str, consequence: str) -> MissingExtra:
    """The error for a library in which something that this project depends on is not what it was."""
    return MissingExtra(
        f"{package} {version(package)} does not have {name} as {CHECKED[package]} has, so {consequence}; "
        f"install: pip install '{package}=={CHECKED[package]}'"
    )
