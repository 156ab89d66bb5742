"""The labelled images that a teacher is adapted with: a few of each class, drawn by their keys."""

from dataclasses import dataclass

from reinforce.data import draws, images
from reinforce.data.shards import Sample
from reinforce.data.status import Status
from reinforce.errors import ConfigError, SampleError
from train.evaluation.sets import EvalSet


@dataclass(frozen=True)
class Labelled:
    """An image, encoded as it is in its tar; its height and width; and its class."""

    key: str
    image: bytes
    size: tuple[int, int]
    label: int


def draw_shots(labelled: EvalSet, classnames: list[str], shots: int | None, seed: int) -> tuple[list[Labelled], int]:
    """`shots` images of each of these classes, or all, and how many were bad. `classnames`: the first of the set's.

    Raises ConfigError where a class has no good image.
    """
    by_class: dict[int, list[Sample]] = {label: [] for label in range(len(classnames))}
    skipped = 0
    for sample, label in labelled.samples():
        if sample.status == Status.GOOD and label in by_class:
            by_class[label].append(sample)
        skipped += sample.status != Status.GOOD
    chosen = []
    for label, samples in by_class.items():
        samples.sort(key=lambda s: (draws.uniforms(seed, "adapt/shots", s.key, 0, 1)[0], s.key))
        good = 0
        for sample in samples:
            if good == shots:
                break
            try:
                picture = images.decode(sample.image)
            except SampleError:
                skipped += 1
                continue
            good += 1
            chosen.append(Labelled(sample.key, sample.image, (picture.height, picture.width), label))
        if not good:
            raise ConfigError(
                f"{labelled.url}: no good image of class {label}, '{classnames[label]}', in its split train; "
                "add some, or take the class out of classnames.txt"
            )
    return chosen, skipped
