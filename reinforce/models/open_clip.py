"""The only door to open_clip: `from reinforce.models.open_clip import open_clip`. It works on a CPU build of torch."""

from reinforce import process
from reinforce.errors import MissingExtra

try:
    process.import_torchvision()
    import open_clip
except MissingExtra:
    raise
except ImportError as error:
    raise MissingExtra.of_models(error.name or str(error)) from error

__all__ = ["open_clip"]
