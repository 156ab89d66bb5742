"""A repository on a hub of models: Hugging Face's, or the one at HF_ENDPOINT."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from reinforce.data.remote import as_os_errors
from reinforce.errors import ConfigError, HubError


class Repository:
    """A repository of models, NAME or OWNER/NAME, which is created where it is not there.

    Raises ConfigError where the hub does not take the name or the token, or there is none; HubError where it does not
    answer.
    """

    def __init__(self, name: str) -> None:
        self.api = HfApi()
        if get_token() is None:
            raise ConfigError(
                f"there is no token for {self.api.endpoint}; run `hf auth login`, or set HF_TOKEN to one that may write"
            )
        try:
            validate_repo_id(name)
            with _as_sentences(f"{self.api.endpoint}, repository {name}"):
                self.name = self.api.create_repo(name, exist_ok=True).repo_id
        except HFValidationError as error:
            raise ConfigError(f"{name} is no name of a repository: {error}") from None
        except HubError as error:
            if error.status in (401, 403):
                raise ConfigError(str(error)) from None
            raise

    def push(self, folder: Path) -> str:
        """Put all files of a folder into it, as one commit. Gives its address. Raises HubError."""
        try:
            with _as_sentences(f"{self.api.endpoint}, repository {self.name}"):
                self.api.upload_folder(
                    repo_id=self.name, folder_path=folder, commit_message="Written by clip-reinforce"
                )
        except HubError as error:
            raise HubError(
                f"{error}; {folder} is whole and stays: `hf upload {self.name} {folder}` tries again"
            ) from None
        return f"{self.api.endpoint}/{self.name}"


@contextmanager
def _as_sentences(where: str) -> Iterator[None]:
    try:
        with as_os_errors():
            yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        told = error.server_message or str(error).partition("\n")[0]
        remedy = {
            401: "; the token is not known there, or has expired: run `hf auth login`, or set HF_TOKEN",
            403: "; the token may not write there: take one with the right to, or another repository",
        }
        raise HubError(f"{where}: {status}, {told}{remedy.get(status, '')}", status) from None
    except (OSError, RuntimeError, ValueError) as error:  # uploads of large files raise the last two
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        raise HubError(f"{where}: {error}" + (f" {cause}" if cause else "")) from None
