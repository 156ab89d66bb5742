"""Experiments, from data to table: `python -m pipelines NAME [options]`. Run again, they go on where they stopped."""

import sys

from reinforce.terminal import errors_as_sentences

EXPERIMENTS = ("comkd", "lambda_sweep", "sample", "start")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in EXPERIMENTS:
        print(f"{__doc__}\nNames: {', '.join(EXPERIMENTS)}; each explains itself with --help.", file=sys.stderr)
        sys.exit(0 if name in ("", "-h", "--help") else 2)
    # Only the one that is asked for is imported, since they load torch.
    if name == "comkd":
        from pipelines.experiments.comkd import main as run
    elif name == "lambda_sweep":
        from pipelines.experiments.lambda_sweep import main as run
    elif name == "sample":
        from pipelines.experiments.sample import main as run
    else:
        from pipelines.experiments.start import main as run
    with errors_as_sentences():
        run(sys.argv[2:])


if __name__ == "__main__":
    main()
