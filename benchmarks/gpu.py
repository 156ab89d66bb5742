"""What only a GPU can say, in steps: `sh benchmarks/gpu.sh` runs them all.

    python -m benchmarks.gpu STEP [NAME] --out FOLDER [--small] [--device cpu]

    card        versions, and the card's own ceilings: a large bfloat16 product, a copy from memory to memory
    scans       SSD as product, in chunks and by mamba-ssm's Triton kernel against its definition: values, gradients, ms
    run         `clip-reinforce run` without Ray: two teachers and a captioner of random weights, a thousand pictures
    pipeline    the same work in this process, by the threads that make views: images a second, what is waited for;
                same bytes?
    teachers    their towers: autocast, weights held in bfloat16, compiled; ms, cosine to float32; which kernels take it
    captions    CoCa: first call, cached decoding under autocast and with weights held, open_clip's way
    losses      of a large batch, forwards and backwards, against whole matrices
    latency     NAME, a student: batch 256, eager and compiled, by train.latency
    training    a step of a student in bfloat16 from the store of `run`, against one without teachers
    table       what the steps said, in lines

Every step writes FOLDER/STEP.json after every fact, so that one that is stopped has said something. Pictures and stores
are under FOLDER/work. `--small` is a rehearsal of everything in small: its numbers mean nothing.
"""

import copy
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import coca, kernels, losses, price
from benchmarks.augment import jpeg, photograph
from reinforce.check.plan import tflop_by_stage
from reinforce.config import Captioner, Recipe, RunOptions, Teacher, ViewSet
from reinforce.data import shards
from reinforce.models.device import card, pick_device
from reinforce.models.ensemble import Answers
from reinforce.models.flops import tflop
from reinforce.models.frozen import FrozenModel
from reinforce.run.worker import Worker
from reinforce.store.store import Store
from train import latency
from train.config import TrainConfig
from train.students import plain_scans, scan

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
ROOT = Path(__file__).parent.parent
MODELS = ROOT / "samples/models"
PACKAGES = ("torch", "triton", "mamba_ssm", "open_clip_torch", "timm", "numpy", "pillow", "zarr")

OutOption = Annotated[Path, typer.Option("--out", help="folder for the answers")]
SmallOption = Annotated[bool, typer.Option("--small", help="a rehearsal")]
DeviceOption = Annotated[str, typer.Option("--device", help="cuda or cpu")]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    product: int = 8192
    copy_bytes: int = 4 << 30
    repeats: int = 6
    lengths: tuple[int, ...] = (64, 200, 256, 1024, 4096, 16384)
    longest_product: int = 4096  # beyond, its masks take too much memory
    longest_definition: int = 1024  # beyond, chunks in float64 stand for it
    tokens: int = 16384  # of all sequences of a timed call
    batch: int = 256
    teachers: tuple[str, ...] = ("ViT-L-14-quickgelu", "ViT-L-14")
    random: bool = True
    views: int = 30
    view_px: int = 224
    tars: int = 4
    batches: int = 2  # of each tar
    threads: tuple[int, ...] = (8,)  # that decode and make views
    captioner: str = "coca_ViT-L-14"
    captions: int = 5
    caption_tokens: int = 30
    captions_as_open_clip: int = 32  # images
    loss_batches: tuple[int, ...] = (8192, 32768)
    student_batches: tuple[int, ...] = (256,)
    student: str = "mamba_small"
    student_batch: int = 64
    steps: int = 6


SMALL = Sizes(
    product=256,
    copy_bytes=1 << 20,
    repeats=2,
    lengths=(64, 80),
    longest_product=64,
    longest_definition=64,
    tokens=160,
    batch=8,
    teachers=tuple(f"local-dir:{MODELS / name}" for name in ("teacher_vit", "teacher_conv")),
    views=2,
    view_px=64,
    batches=1,
    threads=(1, 2),
    captioner=f"local-dir:{MODELS / 'coca'}",
    captions=2,
    caption_tokens=6,
    captions_as_open_clip=2,
    loss_batches=(512,),
    student_batches=(2,),
    student="mamba_tiny",
    student_batch=8,
    steps=2,
)


class Answer:
    """What a step has to say so far; in its file after every fact."""

    def __init__(self, out: Path, name: str, small: bool) -> None:
        self.path, self.start = out / f"{name}.json", time.monotonic()
        self.facts: dict[str, Any] = {"step": name, "small": small}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, **facts: Any) -> None:
        """New facts; of a list, more items of it."""
        for name, fact in facts.items():
            self.facts[name] = self.facts.get(name, []) + fact if isinstance(fact, list) else fact
        self.facts["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.write_text(json.dumps(self.facts, indent=1) + "\n")
        print(json.dumps(facts), flush=True)


class Clock:
    """Median milliseconds of calls: between CUDA events, or by the wall clock on a CPU."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def ms(self, call: Callable[[], Any]) -> float:
        call()
        times: list[float] = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            else:
                began = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - began))
        return statistics.median(times)


def begin(step: str, out: Path, small: bool, device: str) -> tuple[Answer, Sizes, torch.device, Clock]:
    place, sizes = pick_device(device), SMALL if small else Sizes()
    return Answer(out, step, small), sizes, place, Clock(place, sizes.repeats)


def ceiling(out: Path) -> float:
    """TFLOP/s of the large product, which the step `card` has measured; not a number where it has not."""
    path = out / "card.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return float(facts.get("product_tflops", math.nan))


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@app.command("card")
def card_(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """Versions and ceilings."""
    answer, sizes, place, clock = begin("card", out, small, device)
    answer.add(
        **card(place), python=platform.python_version(), versions={package: version(package) for package in PACKAGES}
    )
    answer.add(cores=len(os.sched_getaffinity(0)), threads=torch.get_num_threads(), scans=scan.describe(place))
    side = sizes.product
    a, b = torch.randn(2, side, side, device=place).bfloat16()
    answer.add(product_tflops=2 * side**3 / clock.ms(lambda: a @ b) / 1e9)
    wide = torch.randn(side, side, device=place)
    answer.add(float32_product_tflops=2 * side**3 / clock.ms(lambda: wide @ wide) / 1e9)
    maps, weights = torch.randn(8, 64, 32, 32, device=place), torch.randn(64, 64, 3, 3, device=place)
    exact = F.conv2d(maps.double(), weights.double())
    off = F.conv2d(maps, weights).double() - exact
    answer.add(float32_convolution_error=float(off.norm() / exact.norm()))  # 3e-4 is TF32
    source = torch.randn(sizes.copy_bytes // 4, device=place)
    target = torch.empty_like(source)
    answer.add(copy_tb_per_s=2 * sizes.copy_bytes / clock.ms(lambda: target.copy_(source)) / 1e9)


@app.command()
def scans(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """SSD in all its forms. Errors are the largest difference, of the largest value, to float64."""
    answer, sizes, place, clock = begin("scans", out, small, device)
    torch.manual_seed(0)
    forms = {"product": plain_scans.ssd_product, "chunks": plain_scans.ssd_chunks}
    if place.type == "cuda" and scan.kernel(scan.CHUNK_SCAN):
        forms["kernel"] = scan.ssd_kernel
    answer.add(**card(place), mamba_ssm=version("mamba_ssm"), forms=list(forms), repeats=sizes.repeats)
    for length in sizes.lengths:
        inputs = [t.to(place) for t in kernels.ssd_inputs(2, length)]
        definition = plain_scans.ssd_sequential if length <= sizes.longest_definition else plain_scans.ssd_chunks
        expected = kernels.run(definition, [t.double() for t in inputs])
        many = [t.to(place) for t in kernels.ssd_inputs(max(1, sizes.tokens // length), length)]
        for name, form in forms.items():
            if name == "product" and length > sizes.longest_product:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                row: dict[str, Any] = {"form": name, "length": length, "dtype": str(dtype)[6:]}
                try:
                    narrow, timed = _narrow(inputs, dtype), _narrow(many, dtype)
                    got = kernels.run(form, narrow)
                    errors = [kernels.error([a], [b]) for a, b in zip(got, expected, strict=True)]
                    row |= dict(zip(("value", "d_x", "d_dt", "d_a", "d_b", "d_c", "d_d"), errors, strict=True))
                    with torch.no_grad():
                        row["ms_forward"] = clock.ms(partial(form, *timed))
                    row["ms_both"] = clock.ms(partial(kernels.run, form, timed))
                    row["ok"] = max(errors) <= kernels.tolerance(dtype, place)
                except RuntimeError as error:  # CUDA's and Triton's, out of memory among them
                    row["error"] = str(error)[:300]
                answer.add(rows=[row])


def _narrow(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    wide = kernels.FAMILIES["ssd"][3]
    return [t.to(torch.float32 if i in wide else dtype) for i, t in enumerate(inputs)]


def recipe(sizes: Sizes) -> Recipe:
    """That of DataCompDR-12M, with random weights."""
    return Recipe(
        name="gpu",
        teachers={f"t{i}": Teacher(model=model) for i, model in enumerate(sizes.teachers)},
        view_sets={"base": ViewSet(num_views=sizes.views, view_px=sizes.view_px)},
        captioners={"coca": captioner(sizes)},
        batch_size=sizes.batch,
        weights="random",
    )


def captioner(sizes: Sizes) -> Captioner:
    """Its captions run to their full length, as random weights would not end them anyhow."""
    tokens = sizes.caption_tokens
    return Captioner(
        model=sizes.captioner,
        num_captions=sizes.captions,
        max_tokens=tokens,
        min_tokens=tokens,
        precision="bf16",
    )


def pictures(work: Path, sizes: Sizes) -> str:
    """Tars of drawn pictures of 375 x 500 pixels. Written once."""
    if not (done := work / "pictures.done").is_file():
        (work / "tars").mkdir(parents=True, exist_ok=True)
        num = sizes.batches * sizes.batch
        for tar in range(sizes.tars):
            with ProcessPoolExecutor(8) as pool:
                made = list(pool.map(_drawn, range(tar * num, (tar + 1) * num), chunksize=8))
            samples = [(f"{i:06d}", {"jpg": jpg, "txt": b"a drawn picture"}) for i, jpg in enumerate(made)]
            shards.write(str(work / f"tars/{tar:05d}.tar"), [(f"{tar}-{key}", parts) for key, parts in samples])
        done.touch()
    return str(work / "tars/*.tar")


def _drawn(seed: int) -> bytes:
    return jpeg(photograph(seed))


def bytes_of(store: Path) -> str:
    """SHA-256 over the names and contents of all its files."""
    digest = hashlib.sha256()
    for path in sorted(store.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(store)};".encode() + path.read_bytes())
    return digest.hexdigest()


@app.command()
def run(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """The command itself, from nothing to a store, models' loading included."""
    answer, sizes, place, _ = begin("run", out, small, device)
    work = out / "work"
    tars, store = pictures(work, sizes), work / "stores/run"
    (work / "recipe.json").write_text(recipe(sizes).model_dump_json())
    command = [sys.executable, "-m", "reinforce", "run", tars, "--store", str(store), "--device", place.type]
    command += ["--recipe", str(work / "recipe.json"), "--workers", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer.add(exit=done.returncode, stderr=done.stderr[-2000:])
    answer.add(report=json.loads(done.stdout), sha256=bytes_of(store))
    found = Store(str(store)).promised()
    answer.add(software=found.software, models=found.models)


@app.command()
def pipeline(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """One worker, loaded once, and a store for each number of threads."""
    answer, sizes, place, _ = begin("pipeline", out, small, device)
    work = out / "work"
    listed = shards.expand(pictures(work, sizes))
    num_images = sizes.tars * sizes.batches * sizes.batch
    before = time.monotonic()
    worker = Worker(recipe(sizes), str(work / "stores/0"), RunOptions(workers="0", device=place.type))  # type: ignore[arg-type]
    answer.add(**card(place), loading_s=time.monotonic() - before, images=num_images, views=sizes.views)
    spent: dict[str, float] = {}
    together: Any = worker.loaded.ensemble
    together.encode_images = _counted(together.encode_images, spent, "image_towers_s")
    together.encode_tokens = _counted(together.encode_tokens, spent, "text_towers_s")
    writer: Any = worker.loaded.captioners["coca"]
    writer.caption = _timed(writer.caption, spent, "captions_s")
    stages = tflop_by_stage(worker, set(worker.columns))
    work_tflop = sum(of["tflop"] for of in stages.values())
    answer.add(tflop_an_image={name: of["tflop"] for name, of in stages.items()})
    for threads, tars in ((sizes.threads[0], listed[:1]), *((number, listed) for number in sizes.threads)):
        spent |= {"image_towers_s": 0.0, "text_towers_s": 0.0, "captions_s": 0.0}
        worker.loaded.threads = threads
        folder = work / f"stores/{threads}"
        worker.store = Store(str(folder))
        worker.store.promise(worker.manifest)
        for shard in worker.store.shards():
            worker.store.objects.remove_folder(shard)
        start = time.monotonic()
        with ThreadPoolExecutor(worker.options.shards_in_flight) as pool:
            reports = list(pool.map(worker.reinforce, tars))
        seconds = time.monotonic() - start
        read = sum(report.read for report in reports)
        row: dict[str, Any] = {"threads": threads, "images": read, "seconds": seconds, **spent}
        row["images_per_s"] = read / seconds
        row["without_models_s"] = seconds - sum(spent.values())  # decoding, views and writing that nothing hid
        row["share_of_product"] = read * work_tflop / seconds / ceiling(out)
        row |= {"errors": [report.error for report in reports if report.error], "sha256": bytes_of(folder)}
        answer.add(rows=[row])  # the first is one that warms up
    made = out / "run.json"
    other = json.loads(made.read_text()).get("sha256") if made.is_file() else None
    hashes = {row["sha256"] for row in answer.facts["rows"][1:]}
    answer.add(
        one_process_gives_the_same_bytes=len(hashes) == 1, another_process_too=hashes == {other} if other else None
    )


def _timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """Adds up how long the host waits in a function."""

    def timed(*args: Any) -> Any:
        start = time.monotonic()
        result = function(*args)
        spent[name] += time.monotonic() - start
        return result

    return timed


def _counted(function: Callable[..., Answers], spent: dict[str, float], name: str) -> Callable[..., Answers]:
    """Of a function that gives answers, asking for them and waiting for them."""
    asked = _timed(function, spent, name)
    return lambda *args: _timed(asked(*args), spent, name)


@app.command()
@torch.inference_mode()
def teachers(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """Image and text tower of each teacher, one batch."""
    answer, sizes, place, clock = begin("teachers", out, small, device)
    answer.add(**card(place), batch=sizes.batch, repeats=sizes.repeats)
    for model in sizes.teachers:
        frozen = FrozenModel(Teacher(model=model, precision="bf16"), place, random_seed=0)
        px, length = frozen.image_px, frozen.tokenizer.context_length
        images = frozen.normalise(torch.randint(0, 256, (sizes.batch, px, px, 3), dtype=torch.uint8, device=place))
        tokens = torch.randint(1, frozen.tokenizer.vocab_size, (sizes.batch, length), device=place)
        for tower, inputs in {"image": images, "text": tokens}.items():
            work_tflop = sizes.batch * _tflop(frozen, tower, inputs[:1])
            exact: Tensor | None = None
            for way, call in _ways(frozen, tower, inputs).items():
                row: dict[str, Any] = {"model": Path(model).name, "tower": tower, "way": way}
                try:
                    features = F.normalize(call().double(), dim=-1)
                    exact = features if exact is None else exact
                    cosines = (features * exact).sum(-1)
                    row |= {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
                    row["ms"] = ms = clock.ms(call)
                    row["tflops"] = work_tflop / ms * 1e3
                    row["share_of_product"] = row["tflops"] / ceiling(out)
                except RuntimeError as error:  # the compiler's, out of memory among them
                    row["error"] = str(error)[:300]
                answer.add(rows=[row])
                if way == "held" and place.type == "cuda":
                    answer.add(kernels=[{"model": row["model"], "tower": tower, "ms": kernel_ms(call)}])


def kernel_ms(call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of each kind of kernel of a call, the largest dozen."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    kinds = {event.key[:120]: event.self_device_time_total / 1e3 for event in seen.key_averages()}
    return {name: round(kinds[name], 2) for name in sorted(kinds, key=lambda name: -kinds[name])[:12]}


def _ways(frozen: FrozenModel, tower: str, inputs: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The definition, float32, comes first."""
    method = f"encode_{tower}"
    narrowed = copy.deepcopy(frozen)
    narrowed.hold()
    held = narrowed.model
    narrow = inputs.to(narrowed.dtype) if tower == "image" else inputs

    def autocast() -> Tensor:
        with frozen.autocast():
            features: Tensor = getattr(frozen.model, method)(inputs)
            return features

    torch.compiler.reset()
    ways: dict[str, Callable[[], Tensor]] = {
        "float32": partial(getattr(frozen.model, method), inputs),
        "autocast": autocast,
    }
    if narrowed.dtype == torch.float32:  # of models with BatchNorm
        return ways
    ways["held"] = partial(getattr(held, method), narrow)
    if tower == "image":
        ways["held, compiled"] = partial(torch.compile(getattr(held, method), dynamic=False), narrow)
    return ways


def _tflop(frozen: FrozenModel, tower: str, inputs: Tensor) -> float:
    return tflop(getattr(frozen.model, f"encode_{tower}"), inputs)


@app.command()
def captions(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """CoCa as it decodes today."""
    answer, sizes, place, _ = begin("captions", out, small, device)
    config = captioner(sizes)
    before = time.monotonic()
    frozen = FrozenModel(config, place, random_seed=0)
    answer.add(**card(place), loading_s=time.monotonic() - before, captions=sizes.captions, tokens=sizes.caption_tokens)
    before = time.monotonic()
    coca.measure(frozen, config, sizes.batch, 1, ["cached"], flops=False)
    answer.add(first_s=time.monotonic() - before)
    answer.add(autocast={"cached": coca.measure(frozen, config, sizes.batch, 3, ["cached"], flops=False)["cached"]})
    frozen.hold()
    answer.add(held={"cached": coca.measure(frozen, config, sizes.batch, 3, ["cached"], flops=False)["cached"]})
    few = sizes.captions_as_open_clip
    for way in ("image once", "open_clip"):
        told = coca.measure(frozen, config, few, 1, ["cached", way], flops=False)
        answer.add(**{way.replace(" ", "_"): {"images": few, **told}})


@app.command("losses")
def losses_(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """Two teachers of 768 numbers, a student of 512."""
    answer, sizes, place, _ = begin("losses", out, small, device)
    for batch in sizes.loss_batches:
        try:
            answer.add(rows=[losses.compare((batch, 512, 2, 768, place.type), sizes.repeats)])
        except torch.OutOfMemoryError as error:
            answer.add(rows=[{"batch": batch, "error": str(error)[:300]}])


@app.command("latency")
def latency_(
    name: Annotated[str, typer.Argument(help="a student")],
    out: OutOption,
    size: Annotated[int, typer.Option(help="pixels")] = 256,
    small: SmallOption = False,
    device: DeviceOption = "cuda",
) -> None:
    """One student in a process of its own."""
    answer, sizes, place, _ = begin(f"latency-{name}", out, small, device)
    repeats = 5 * sizes.repeats
    for compiled in (False, True):
        for batch in sizes.student_batches:
            try:
                rows = latency.measure([name], [size], [batch], repeats, str(place), "bf16", compiled, ["image"])
            except RuntimeError as error:  # the compiler's
                answer.add(rows=[{"batch": batch, "compiled": compiled, "error": str(error)[:300]}])
            else:
                answer.add(rows=[asdict(row) for row in rows])


@app.command()
def training(out: OutOption, small: SmallOption = False, device: DeviceOption = "cuda") -> None:
    """Loading is in this process, so that it is no measure of a training's own."""
    answer, sizes, place, _ = begin("training", out, small, device)
    work = out / "work"
    config = TrainConfig(
        student=sizes.student,
        shards=pictures(work, sizes),
        store=str(work / "stores/run"),
        global_batch_size=sizes.student_batch,
        precision="amp_bf16",
    )
    answer.add(**card(place), **price.measure(config, sizes.steps, 0, place))


@app.command()
def table(out: OutOption) -> None:
    """Everything that is in the folder."""
    for path in sorted(out.glob("*.json")):
        facts = json.loads(path.read_text())
        rows = facts.pop("rows", [])
        print(f"== {facts.pop('step')}{' (a rehearsal)' if facts.pop('small') else ''}")
        print("   " + ", ".join(f"{name} {_short(fact)}" for name, fact in facts.items() if name not in ("models",)))
        for row in rows:
            print("   " + "  ".join(f"{name} {_short(fact)}" for name, fact in row.items() if name != "machine"))


def _short(fact: Any) -> str:
    if isinstance(fact, float):
        return f"{fact:.4g}"
    if isinstance(fact, dict):
        return "{" + ", ".join(f"{name} {_short(value)}" for name, value in fact.items()) + "}"
    return str(fact)[-300:]


if __name__ == "__main__":
    app()
