"""Experiments: commands of the project one after the other, up to a table."""

from pathlib import Path

from reinforce.errors import ConfigError


def bundled() -> Path:
    """The folder of the bundled samples. Raises ConfigError where it is not."""
    folder = Path("samples")
    if not (folder / "train").is_dir():
        raise ConfigError("no samples/train here; the bundled samples are in a checkout of this project: run it there")
    return folder
