"""What to say of weights that cannot be had, read or fitted to a model."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from reinforce.config import Model
from reinforce.errors import ConfigError

_TOLD = 400  # letters of what a library says: of weights that do not fit it names each
OFFLINE = (
    "without internet name a file (pretrained=FILE) or a folder (model=local-dir:FOLDER), or set HF_HOME to a cache "
    "that was filled elsewhere"
)


@contextmanager
def loading(config: Model) -> Iterator[None]:
    """For the call of a library that builds a model and reads its weights. A file may hold anything: libraries assert,
    index and unpickle, and whatever they raise is ConfigError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise _not_loaded(config, error) from error


def _not_loaded(config: Model, error: Exception) -> ConfigError:
    told = " ".join(str(error).split()) or "its weights are not those of this architecture"
    told = told[:_TOLD] + (" .." if len(told) > _TOLD else "")
    name = config.model + (f",{config.pretrained}" if config.pretrained else "")
    here = config.model.startswith("local-dir:") or (config.pretrained and os.path.isfile(config.pretrained))
    remedy = "see that file and model belong together" if here else OFFLINE
    return ConfigError(f"{name} cannot be loaded: {type(error).__name__}: {told}; {remedy}")
