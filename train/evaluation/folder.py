"""A folder in CLIP_benchmark's layout, local or an fsspec URL: its small files, and where its tars lie."""

import fsspec

from reinforce.data.remote import as_os_errors
from reinforce.data.shards import Shard
from reinforce.errors import ConfigError, MissingExtra

NSHARDS = "nshards.txt"


class Folder:
    """Raises ConfigError where a URL or a file cannot be read, MissingExtra."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise MissingExtra(f"{url}: {error}") from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}; give a folder, or tars as 'DIR/*.tar'") from None

    def text(self, name: str) -> str | None:
        """The text of a file, None where there is none."""
        try:
            with as_os_errors():
                data: bytes = self.files.cat_file(f"{self.path}/{name}")
            return data.decode("utf-8-sig")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.url}/{name}: cannot be read: {error}") from error

    def lines(self, name: str) -> list[str] | None:
        text = self.text(name)
        return None if text is None else [line.strip() for line in text.rstrip().splitlines()]

    @as_os_errors()
    def exists(self, name: str) -> bool:
        return bool(self.files.exists(f"{self.path}/{name}"))

    def shards(self, split: str) -> list[Shard]:
        """Its tars. Raises ConfigError where it has none, or fewer or more than it says."""
        where = f"{self.url}/{split}/{NSHARDS}"
        text = self.text(f"{split}/{NSHARDS}")
        if text is None:
            raise ConfigError(
                f"{where}: not found; an evaluation set is a folder in CLIP_benchmark's layout, or tars as 'DIR/*.tar'"
            )
        if text.lstrip().startswith("<"):
            raise ConfigError(
                f"{where} is a page about the file; of a repository on Hugging Face give .../resolve/main"
            )
        if not text.strip().isdecimal() or int(text) == 0:
            raise ConfigError(f"{where}: says '{text.strip()[:40]}'; it has to be the number of tars beside it")
        num = int(text)
        absent = next((i for i in range(num) if not self.exists(f"{split}/{i}.tar")), None)
        if absent is not None:
            raise ConfigError(f"{where}: says {num}, and {absent}.tar is not there; add it, or correct the number")
        if self.exists(f"{split}/{num}.tar"):
            raise ConfigError(f"{where}: says {num}, and {num}.tar is there as well; remove it, or correct the number")
        return [Shard(str(i), f"{self.url}/{split}/{i}.tar") for i in range(num)]
