"""DataComp's 38 tasks on whatever of them lies in a folder.

Source: DataComp (Gadre et al. 2023, arXiv 2304.14108, table 12); names, metrics and which tasks count are those of its
`tasklist.yml` and `eval_utils/`, also where WILDS' own code differs: FMoW's region "Other" is a group like the others.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reinforce.data.remote import as_os_errors
from reinforce.errors import ConfigError, ReinforceError
from reinforce.progress import Progress
from train.evaluation.folder import NSHARDS, Folder
from train.evaluation.metrics import (
    Embedder,
    Metrics,
    Precision,
    embed_classes,
    embed_images,
    macro_f1,
    retrieval_of,
    worst_group,
    zeroshot,
)
from train.evaluation.sets import EvalSet

_ROWS = 1024  # images held at once: ImageNet's would take 10 GB
_DEPTH = 3  # folders above `test`: DIR/wds/vtab/cifar10/test


@dataclass(frozen=True)
class Task:
    """`key` and `name` are DataComp's, `metric` the one that counts; `also`: what OpenAI and CLIP_benchmark call it."""

    key: str
    name: str
    metric: str = "acc1"
    also: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {_plain(name) for name in (self.key, self.name, *self.also)}


_PER_CLASS, _BOTH_WAYS = "mean_per_class_recall", "mean_recall@1"
DATACOMP = (
    Task("vtab/caltech101", "Caltech-101", _PER_CLASS),
    Task("cifar10", "CIFAR-10"),
    Task("vtab/cifar100", "CIFAR-100"),
    Task("vtab/clevr_count_all", "CLEVR Counts", also=("clevr",)),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance"),
    Task("country211", "Country211"),
    Task("vtab/dtd", "Describable Textures"),
    Task("vtab/eurosat", "EuroSAT"),
    Task("fgvc_aircraft", "FGVC Aircraft", _PER_CLASS, also=("aircraft",)),
    Task("food101", "Food-101"),
    Task("gtsrb", "GTSRB"),
    Task("imagenet1k", "ImageNet 1k", also=("imagenet",)),
    Task("imagenet_sketch", "ImageNet Sketch"),
    Task("imagenetv2", "ImageNet v2"),
    Task("imagenet-a", "ImageNet-A"),
    Task("imagenet-o", "ImageNet-O"),
    Task("imagenet-r", "ImageNet-R"),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", also=("kitti", "kitti_distance")),
    Task("mnist", "MNIST"),
    Task("objectnet", "ObjectNet"),
    Task("vtab/flowers", "Oxford Flowers-102", _PER_CLASS, also=("flowers102",)),
    Task("vtab/pets", "Oxford-IIIT Pet", _PER_CLASS, also=("oxford_pets", "oxford_iiit_pets")),
    Task("voc2007", "Pascal VOC 2007", also=("pascal_voc_2007_classification",)),
    Task("vtab/pcam", "PatchCamelyon"),
    Task("renderedsst2", "Rendered SST2", also=("sst2",)),
    Task("vtab/resisc45", "RESISC45"),
    Task("cars", "Stanford Cars"),
    Task("stl10", "STL-10"),
    Task("sun397", "SUN397"),
    Task("vtab/svhn", "SVHN"),
    Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", _BOTH_WAYS, also=("flickr30k",)),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", _BOTH_WAYS, also=("mscoco_captions", "coco")),
    Task("misc/winogavil", "WinoGAViL", "jaccard_score_10-12"),
    Task("wilds/iwildcam", "iWildCam", "F1-macro_all"),
    Task("wilds/camelyon17", "Camelyon17"),
    Task("wilds/fmow", "FMoW", "acc_worst_region"),
    Task("fairness/dollar_street", "Dollar Street", "acc_top5_wg"),
    Task("fairness/geode", "GeoDE", "acc_wg"),
)
# Of each that needs another number than `zeroshot` and `retrieval` give: groups' worst, by how many nearest count.
_WORST = {"acc_worst_region": 1, "acc_wg": 1, "acc_top5_wg": 5}
NOT_HERE = {"WinoGAViL": "its images come in groups of a riddle, which the layout of these folders cannot hold"}


@dataclass
class SuiteReport:
    """`results`: of each task that was there, as DataComp writes them: `key`, `dataset`, and `metrics` with the
    `main_metric`, shares from 0 to 1; and `metric`, which one that is. `average`: of the main metrics, None where there
    are none. `absent`: tasks that have no folder. `failed`: why a task's folder could not be read. `not_computed`:
    tasks that this command cannot do, with the reason."""

    folder: str
    average: float | None = None
    num_tasks: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    not_computed: dict[str, str] = field(default_factory=lambda: dict(NOT_HERE))

    def table(self) -> str:
        width = max(len(task.name) for task in DATACOMP)
        lines = [
            f"{result['dataset']:{width}}  {result['metric']:21}  {result['metrics']['main_metric']:6.1%}"
            for result in self.results
        ]
        if self.average is not None:
            lines += ["", f"{'average':{width}}  of {self.num_tasks} of {len(DATACOMP):<15}  {self.average:6.1%}", ""]
        lines += [f"failed: {name}: {why}" for name, why in self.failed.items()]
        lines += [f"not in {self.folder}: {', '.join(self.absent)}"] if self.absent else []
        lines += [f"not computed: {name}: {why}" for name, why in self.not_computed.items()]
        return "\n".join(lines)


def evaluate_suite(student: Embedder, folder: str, batch_size: int = 256, precision: Precision = "fp32") -> SuiteReport:
    """Score a student, which is in eval mode, on every task of DATACOMP that `find` finds in a folder. A task that
    cannot be read is told of and costs itself. Raises ConfigError where there is no task, or no folder."""
    found = find(folder)
    report = SuiteReport(folder)
    report.absent = [task.name for task in DATACOMP if task not in found and task.name not in NOT_HERE]
    with Progress(len(found), "task") as progress:
        for task, url in found.items():
            try:
                metrics = _score(student, task, url, batch_size, precision)
            except (ReinforceError, OSError) as error:
                report.failed[task.name] = str(error)
            else:
                metrics = {"main_metric": metrics[task.metric]} | metrics
                told = {"key": task.key, "dataset": task.name, "metric": task.metric, "metrics": metrics}
                report.results.append(told)
            progress.add(task.name)
    report.num_tasks = len(report.results)
    if report.results:
        report.average = sum(r["metrics"]["main_metric"] for r in report.results) / report.num_tasks
    return report


def find(folder: str) -> dict[Task, str]:
    """The folder of each task that is there: below `folder`, with a `test/nshards.txt`, and called as DataComp, OpenAI,
    open_clip or CLIP_benchmark call it, as `wds_vtab-cifar10_test`, `vtab/cifar10` or `CIFAR-10`.

    Raises ConfigError where there is none, or where two are of one task.
    """
    top = Folder(folder.rstrip("/"))
    by_name = {name: task for task in DATACOMP for name in task.names if task.name not in NOT_HERE}
    found: dict[Task, str] = {}
    for path in sorted(_sets(top)):
        task = by_name.get(_plain(path))
        if task and task in found:
            raise ConfigError(f"{found[task]} and {top.url}/{path} are both {task.name}; leave one of them there")
        if task:
            found[task] = f"{top.url}/{path}"
    if not found:
        lacks = "holds" if top.exists("") else "is not there, so it holds"
        raise ConfigError(
            f"{folder} {lacks} none of DataComp's tasks; they are folders in CLIP_benchmark's layout, called as "
            f"{', '.join(task.key for task in DATACOMP[:3])} or wds_{DATACOMP[0].key.replace('/', '-')}_test"
        )
    return {task: found[task] for task in DATACOMP if task in found}


@as_os_errors()
def _sets(top: Folder) -> list[str]:
    """Paths of the evaluation sets below a folder."""
    end = f"/test/{NSHARDS}"
    files = top.files.find(top.path, maxdepth=_DEPTH + 2)
    return [file[len(top.path) :].strip("/").removesuffix(end) for file in files if file.endswith(end)]


def _plain(name: str) -> str:
    """What is the same in all ways to write a name: of `wds_vtab-cifar10_test` it is `cifar10`."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    while words and words[0] in ("wds", "vtab", "retrieval", "misc", "wilds", "fairness"):
        words.pop(0)
    return "".join(words[:-1] if words[-1:] == ["test"] else words)


def _score(student: Embedder, task: Task, url: str, batch_size: int, precision: Precision) -> Metrics:
    """All metrics of a task, among them the one that counts, and `num_skipped`."""
    grouped = task.metric in _WORST
    eval_set = EvalSet(url, grouped=grouped)
    features, truth, skipped = list[Tensor](), list[Any](), 0
    for part in eval_set.parts(student.preprocess_cfg, _ROWS):
        features.append(embed_images(student, part.images, batch_size, precision))
        truth += part.truth
        skipped += part.num_skipped
    images = torch.cat(features)
    if (eval_set.prompts is None) != (task.metric == _BOTH_WAYS):
        raise ConfigError(f"{url}: {task.name} needs images with {'captions' if eval_set.prompts else 'classes'}")
    if eval_set.prompts is None:
        metrics = retrieval_of(student, images, truth, batch_size, precision)
        mean = (metrics["text_retrieval_recall@1"] + metrics["image_retrieval_recall@1"]) / 2
        return metrics | {_BOTH_WAYS: mean, "num_skipped": skipped}
    labels = torch.tensor([label for label, _ in truth] if grouped else truth)
    classes = embed_classes(student, eval_set.prompts, batch_size, precision)
    metrics = zeroshot(images, labels, classes)
    if grouped:
        groups = torch.tensor([group for _, group in truth])
        metrics[task.metric] = worst_group(images, labels, classes, groups, _WORST[task.metric])
    elif task.metric == "F1-macro_all":
        metrics[task.metric] = macro_f1(images, labels, classes)
    return metrics | {"num_skipped": skipped}
