"""What crosses between host and device, and what is computed twice, counted: on a device of no arithmetic.

`meta` tensors have shapes and no values. `Counter` lets them pass for a GPU: what is asked back of them is one number
throughout.
"""

from collections import Counter as Counts
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reinforce.config import Recipe, RunOptions
from reinforce.data.shards import expand
from reinforce.models import frozen
from reinforce.models.captioner import Captioner
from reinforce.models.ensemble import Ensemble
from reinforce.models.open_clip import open_clip
from reinforce.recipes import load_recipe
from reinforce.run import worker
from reinforce.run.worker import Worker
from tests import tiny

META, CPU = torch.device("meta"), torch.device("cpu")
START_OF_TEXT = 49406
aten = torch.ops.aten


@dataclass
class Seen:
    """Tensors brought to the device, by shape; waits for it; weights that were given another type."""

    uploads: Counts[tuple[int, ...]] = field(default_factory=Counts)
    waits: int = 0
    casts: int = 0


class Counter(TorchDispatchMode):
    """Counts in `seen`, where the device is meta."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Seen()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        if name is aten._local_scalar_dense and args[0].is_meta:
            self.seen.waits += 1
            return True if args[0].dtype == torch.bool else 0
        if name is aten._to_copy:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            if (source, target) == (META, CPU):
                self.seen.waits += 1
                return torch.full(args[0].shape, START_OF_TEXT, dtype=kwargs.get("dtype") or args[0].dtype)
            if (source, target) == (CPU, META):
                self.seen.uploads[tuple(args[0].shape)] += 1
            elif isinstance(args[0], nn.Parameter) and kwargs.get("dtype") not in (None, args[0].dtype):
                self.seen.casts += 1
        if name is aten.copy_ and args[0].is_meta and args[1].device == CPU:
            self.seen.uploads[tuple(args[1].shape)] += 1
            return args[0]
        with self:  # under inference_mode compositions of operations come here whole
            parts = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if parts is NotImplemented else parts


def shallow(tree: Any) -> Any:
    """A model's config with two layers in each tower."""
    if not isinstance(tree, dict):
        return tree
    return {name: 2 if name == "layers" else shallow(node) for name, node in tree.items()}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two batches of `datacompdr_12m`, 4 images, 2 views, 2 captions, on the device of no arithmetic: what was seen
    while loading, in each call, and between calls."""
    folder = tmp_path_factory.mktemp("meta")
    whole: Recipe = load_recipe("datacompdr_12m")
    recipe = whole.but(
        batch_size=4,
        weights="random",
        view_sets={"base": whole.view_sets["base"].but(num_views=2)},
        teachers={name: teacher.but(precision="bf16") for name, teacher in whole.teachers.items()},
        captioners={
            name: captioner.but(precision="bf16", max_tokens=5, num_captions=2)
            for name, captioner in whole.captioners.items()
        },
    )
    counter, calls = Counter(), list[tuple[str, Seen]]()

    def told(kind: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            before, counter.seen = counter.seen, Seen()
            answers = function(*args)
            found = answers() if callable(answers) else answers
            calls.append((kind, counter.seen))
            counter.seen = before
            return (lambda: found) if callable(answers) else answers

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "pick_device", lambda name: META)
        patch.setattr(frozen, "weights_digest", lambda model: "of no weights")
        for owner, method, kind in (
            (Ensemble, "encode_images", "view"),
            (Ensemble, "encode_tokens", "text"),
            (Captioner, "caption", "captions"),
        ):
            whole_method = getattr(owner, method)
            patch.setattr(owner, method, lambda self, *args, m=whole_method, k=kind: told(k, m)(self, *args))
        for name in ("ViT-L-14", "ViT-L-14-quickgelu", "coca_ViT-L-14"):  # what crosses does not depend on the depth
            patch.setitem(open_clip.factory._MODEL_CONFIGS, name, shallow(open_clip.get_model_config(name)))
        create = frozen._create

        def nowhere(*args: Any) -> Any:
            with META:
                return create(*args)

        patch.setattr(frozen, "_create", nowhere)
        with counter:
            made = Worker(recipe, str(folder / "store"), RunOptions(decode_threads=2))
        loading, counter.seen = counter.seen, Seen()
        with counter:
            report = made.reinforce(*expand(tiny.tar(folder / "00000.tar", 8, 0)))
        assert report.error == "" and report.read == 8
        yield {"loading": loading, "calls": calls, "else": counter.seen}


def of(counted: dict[str, Any], kind: str) -> list[Seen]:
    return [seen for of_kind, seen in counted["calls"] if of_kind == kind]


def test_a_view_goes_up_once_and_comes_back_once(counted: dict[str, Any]) -> None:
    views = of(counted, "view")
    assert len(views) == 2 * 2
    for seen in views:
        assert dict(seen.uploads) == {(4, 224, 224, 3): 1} and seen.waits == 1


def test_a_text_goes_up_once_and_comes_back_once(counted: dict[str, Any]) -> None:
    texts = of(counted, "text")
    assert len(texts) == 2 * (1 + 2)  # the original caption and those of the CoCa
    for seen in texts:
        assert dict(seen.uploads) == {(4, 77): 1} and seen.waits == 1


def test_captions_are_waited_for_once(counted: dict[str, Any]) -> None:
    first, second = of(counted, "captions")
    assert (first.waits, second.waits) == (1, 1)
    assert dict(second.uploads) == {(4, 224, 224, 3): 1, (4, 2, 5): 1}  # of the first, its memory as well


def test_nothing_is_waited_for_between(counted: dict[str, Any]) -> None:
    assert counted["else"].waits == 0 and not counted["else"].uploads


def test_no_weight_is_cast_after_loading(counted: dict[str, Any]) -> None:
    assert [seen.casts for _, seen in counted["calls"]] == [0] * len(counted["calls"])
    assert counted["loading"].casts > 50
