"""What remote file systems raise, as OSError.

fsspec hands on whatever the library below raises: aiohttp's and botocore's errors are no OSError, and would pass all
that waits for one. Only errors of such libraries are taken for it; a fault of ours stays what it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
