"""What remote file systems raise, as OSError.

fsspec hands on whatever the library below raises: aiohttp's and botocore's errors are no OSError, and would pass all
that waits for one. Only errors of such libraries are taken for it; a fault of ours stays what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from reinforce.errors import ConfigError, MissingExtra

_LIBRARIES = {
    *("aiohttp", "aiobotocore", "botocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "huggingface_hub"),
    *("httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3", "paramiko"),
}


@contextmanager
def as_os_errors() -> Iterator[None]:
    """For a call, a block, or a function that it decorates."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _LIBRARIES:
            raise
        raise OSError(f"{type(error).__name__}: {error}") from error


def file_system(url: str) -> Any:
    """The kind of file system that an address is of. Raises ConfigError where there is none of that name, MissingExtra
    where its package is not installed."""
    protocol = fsspec.utils.get_protocol(url)
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise MissingExtra(f"{url}: {error}") from None
    except ValueError:
        raise ConfigError(f"{url}: no file system is called '{protocol}'; try s3://, gs:// or hf://") from None
