"""How far apart do students hold different images before they have learned anything? Those that do not may never learn.

Command: python -m pipelines start [STUDENT ..] [--shards TARS]    (default: the small students, the bundled samples)
Machine: 2 CPU cores; seconds for small students, half a minute for each of full size.
Result:  a table; the numbers to expect are in docs/results/start.md.

The images are views of the samples, drawn as for a training.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from pipelines.experiments import bundled
from reinforce.config import ViewSet
from reinforce.data import augment, images, shards
from reinforce.data.status import Status
from train import students
from train.collapse import mean_cosine
from train.evaluation.metrics import embed_images
from train.students import Student

SMALL = ("mamba_tiny", "mobileclip_s0_tiny", "resnet_tiny", "vit_tiny")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", nargs="*", default=list(SMALL), help=f"of {', '.join(students.names())}, or folders")
    parser.add_argument("--shards", help="tars to take images from (default: the bundled samples)")
    parser.add_argument("--images", type=int, default=64, help="how many (default: 64)")
    parser.add_argument("--seeds", type=int, default=3, help="starts per student (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    tars = options.shards or f"{bundled()}/train/*.tar"
    found: dict[str, list[tuple[float, float]]] = {}
    for name in options.student:
        views: list[Tensor] = []
        for seed in range(options.seeds):
            student = students.create(name, seed)
            views = views or views_of(tars, options.images, student.image_px)
            found.setdefault(name, []).append(apart(student, views))
    print(json.dumps(found) if options.json else _markdown(found))


def views_of(tars: str, num: int, size: int) -> list[Tensor]:
    """One view of each of `num` samples spread over the tars, fewer where there are not so many: uint8 (3, size, size).

    Raises ConfigError where there are no tars, SampleError where an image cannot be decoded.
    """
    view_set = ViewSet(num_views=1, view_px=size)
    good = [s for shard in shards.expand(tars) for s in shards.read(shard) if s.status == Status.GOOD]
    views = []
    for sample in islice(good, 0, None, max(1, len(good) // num)):
        picture = images.decode(sample.image)
        shape = (picture.height, picture.width)
        params = augment.draw(view_set, 0, "start", sample.key, 0, shape)
        views.append(torch.from_numpy(augment.replay(picture, params, shape, size)).permute(2, 0, 1))
    return views[:num]


def apart(student: Student, views: Sequence[Tensor]) -> tuple[float, float]:
    """Mean cosine of the features of different images, and the effective rank of these: the exponential of the entropy
    of the shares that their principal axes have of the variance (Roy and Vetterli, 2007)."""
    # BatchNorm takes away what is common to a batch; in eval mode it does so only when it has learned.
    norms = any(isinstance(module, nn.BatchNorm2d) for module in student.model.visual.modules())
    student.model.train(norms)
    features = embed_images(student, views, len(views)).double()
    shares = torch.linalg.svdvals(features - features.mean(0)).square()
    shares = shares / shares.sum()
    rank = (-(shares * shares.clamp_min(1e-12).log()).sum()).exp()
    return mean_cosine(features).item(), rank.item()


def _markdown(found: dict[str, list[tuple[float, float]]]) -> str:
    lines = ["| student | mean cosine by seed | effective rank by seed |", "|---|---|---|"]
    for name, starts in found.items():
        cosines = " ".join(f"{cosine:.2f}" for cosine, _ in starts)
        ranks = " ".join(f"{rank:.0f}" for _, rank in starts)
        lines.append(f"| `{name}` | {cosines} | {ranks} |")
    return "\n".join(lines)
