"""Every error a user can meet, drawn as one tree.

    ReinforceError
    ├── ConfigError (ValueError)        the request is wrong; found before any work
    ├── MissingExtra (ImportError)      an optional part is not installed, or in a version that does not fit
    ├── ShardError (OSError)            a tar cannot be read to its end
    ├── SampleError (ValueError)        one image or caption cannot be used; goes to quarantine
    ├── ReplayError (ValueError)        view parameters and image do not belong together
    ├── Diverged (ArithmeticError)      a loss is NaN or infinite
    ├── Unwritable                      the store takes nothing more: its disk is full, or may not be written to
    ├── DeviceLost (RuntimeError)       a GPU has failed, and this process can use it no more
    ├── HubError (OSError)              a hub of models does not answer, or refuses
    └── StoreError
        ├── ManifestMismatch            the store promises something other than was asked
        ├── NotCommitted (LookupError)  the column is not there (yet)
        └── Corrupt                     the column is there and is damaged

A message says what is wrong, where (shard, key, column), and what to do.
"""

from typing import Self

from reinforce.lines import plain, without_secrets


class ReinforceError(Exception):
    """Base of all errors raised on purpose by this project. Each argument is a line of the message, whatever names are
    in it; of addresses no secret is kept."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*(plain(without_secrets(str(line))) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class ConfigError(ReinforceError, ValueError):
    """The request is wrong: an unknown key, an impossible value, a pattern that names nothing."""


class MissingExtra(ReinforceError, ImportError):
    """A part of the project was used that needs a dependency which is not installed, or not in a version that fits."""

    @classmethod
    def of_models(cls, package: str) -> Self:
        """For what the writer and the trainer both need wherever there is a model."""
        return cls(
            f"{package} is not installed; the writer needs: pip install 'clip-reinforce[reinforce]', "
            "the trainer: pip install 'clip-reinforce[train]'"
        )


class ShardError(ReinforceError, OSError):
    """A tar cannot be opened, or ends in the middle."""


class SampleError(ReinforceError, ValueError):
    """One sample cannot be used. `status` (a `Status` of data/status.py) is why; the message is the detail."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = str(self)

    def __reduce__(self) -> tuple[type[Self], tuple[int, str]]:
        return type(self), (self.status, self.message)


class ReplayError(ReinforceError, ValueError):
    """The parameters of a view were drawn for an image of another size."""


class Diverged(ReinforceError, ArithmeticError):
    """The loss of a step is NaN or infinite; nothing of that step was kept."""


class Unwritable(ReinforceError):
    """No other shard could be written either, and each would be computed in vain."""


class DeviceLost(ReinforceError, RuntimeError):
    """A call failed on the GPU in a way after which all calls of this process fail: an illegal access, an ECC error."""


class HubError(ReinforceError, OSError):
    """A hub of models does not answer, or refuses; `status` is that of HTTP, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class StoreError(ReinforceError):
    """Base of what can be wrong with a store."""


class ManifestMismatch(StoreError):
    """What was asked and what the store holds do not agree."""


class NotCommitted(StoreError, LookupError):
    """A column was asked for that has not been written."""


class Corrupt(StoreError):
    """A committed column is damaged: an object is missing, empty or altered."""
