"""Where an export goes: nothing is written over."""

from pathlib import Path

from reinforce.errors import ConfigError


def check_empty(out: Path) -> None:
    """Raises ConfigError where something lies at or in the folder that is to be written."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is written over; give another folder, or remove it")
