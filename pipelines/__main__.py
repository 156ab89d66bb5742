"""Experiments, from data to table: `python -m pipelines NAME [options]`. Run again, they go on where they stopped."""

import sys

from reinforce import signals
from reinforce.terminal import errors_as_sentences

QUESTIONS = (
    "encoder",
    "feature_distance",
    "how_many",
    "ladder",
    "lambda_sweep",
    "many_students",
    "resolution",
)  # all of pipelines/experiments/questions.py
EXPERIMENTS = ("comkd", "sample", "start", *QUESTIONS)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in EXPERIMENTS:
        print(f"{__doc__}\nNames: {', '.join(EXPERIMENTS)}; each explains itself with --help.", file=sys.stderr)
        sys.exit(0 if name in ("", "-h", "--help") else 2)
    with signals.taken(ends=True), errors_as_sentences():
        _run(name, sys.argv[2:])


def _run(name: str, argv: list[str]) -> None:
    # Only the one that is asked for is imported, since they load torch.
    if name in QUESTIONS:
        from pipelines.experiments import questions

        questions.main(name, argv)
    elif name == "comkd":
        from pipelines.experiments import comkd

        comkd.main(argv)
    elif name == "sample":
        from pipelines.experiments import sample

        sample.main(argv)
    else:
        from pipelines.experiments import start

        start.main(argv)


if __name__ == "__main__":
    main()
