"""The only door to open_clip: `from reinforce.models.open_clip import open_clip`. It works on a CPU build of torch."""

from reinforce import process

with process.model_packages():
    import open_clip

__all__ = ["open_clip"]
