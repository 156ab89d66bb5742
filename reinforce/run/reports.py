"""What workers and runs say they did: counts, never data. These travel through Ray and out of `--json`."""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from reinforce.lines import plain, without_secrets


@dataclass(frozen=True)
class ShardReport:
    """One shard: read = valid + the sum of quarantined. `noted` counts what is in its tar and not used
    (data/notes.py); `first` says of each reason and each note where it came first, and what to do. `error` says why
    nothing of it was written, `final` that another try would find the same. `embedding_loss`: by teacher what int8 lost
    (store/packing.py)."""

    shard: str
    read: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    empty_captions: int = 0
    columns_written: int = 0
    seconds: float = 0.0
    error: str = ""
    final: bool = False
    noted: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    embedding_loss: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def valid(self) -> int:
        return self.read - sum(self.quarantined.values())

    def line(self, tries: int) -> str:
        """All of it as one line of JSON, with the time at which it was told (UTC)."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return json.dumps({"time": now, "shard": self.shard, "valid": self.valid, "tries": tries} | asdict(self))


@dataclass(frozen=True)
class Failure:
    """A shard that is still not whole after so many tries. `quarantined` and `noted` count its bad samples and what is
    not used, where it was read to its end; `first` and `final` as in ShardReport."""

    shard: str
    attempts: int
    reason: str
    quarantined: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    final: bool = True

    def __post_init__(self) -> None:
        """What a library said of an address has no secrets here."""
        object.__setattr__(self, "reason", plain(without_secrets(self.reason)))


@dataclass
class RunReport:
    """One run. `samples`, `valid`, `quarantined`, `noted` count the shards committed in it; `first` as in ShardReport.
    `embedding_loss`: by teacher the largest loss of a shard."""

    store: str
    shards: int
    already_there: int
    done: int = 0
    samples: int = 0
    valid: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    empty_captions: int = 0
    failed: list[Failure] = field(default_factory=list)
    workers_lost: int = 0
    seconds: float = 0.0
    embedding_loss: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, report: ShardReport, attempts: int) -> None:
        """Count a shard's last report."""
        if report.error:
            told = report.quarantined, report.noted, report.first, report.final
            self.failed.append(Failure(report.shard, attempts, report.error, *told))
            return
        self.done += 1
        self.samples += report.read
        self.valid += report.valid
        self.empty_captions += report.empty_captions
        self.quarantined = dict(sorted((Counter(self.quarantined) + Counter(report.quarantined)).items()))
        self.noted = dict(sorted((Counter(self.noted) + Counter(report.noted)).items()))
        self.first = report.first | self.first
        for teacher, lost in report.embedding_loss.items():
            most = self.embedding_loss.get(teacher, lost)
            self.embedding_loss[teacher] = max(lost, most, key=lambda of: of["kl"])

    def in_words(self) -> list[str]:
        """Lines of text: what was done, what is wrong with samples and shards, and what to do."""
        if self.already_there == self.shards:
            all_of_them = "The shard is" if self.shards == 1 else f"All {self.shards} shards are"
            told = [f"{all_of_them} in {self.store} already; nothing to do ({self.seconds:.1f} s)."]
        else:
            told = [
                f"{self.done} of {self.shards} shards reinforced in {self.seconds:.0f} s"
                + (f", {self.already_there} were there already" if self.already_there else "")
                + f": {self.samples} samples read, {self.valid} good"
                + "".join(f", {num} {reason}" for reason, num in self.quarantined.items())
                + "."
            ]
        told += [f"Bad:    {num} {reason}, as {self.first[reason]}" for reason, num in self.quarantined.items()]
        told += [f"Noted:  {num} {kind}, as {self.first[kind]}" for kind, num in self.noted.items()]
        for final, remedy in ((True, "They stay so until this is mended:"), (False, "Run again to retry:")):
            if failed := [failure for failure in self.failed if failure.final == final]:
                told.append(f"Failed: {len(failed)} of {self.shards} shards. {remedy}")
            for failure in failed:
                told.append(f"  {failure.shard}  (tries: {failure.attempts})  {failure.reason}")
                noted = failure.noted if failure.quarantined else {}
                told += [f"    {num} {kind}, as {failure.first[kind]}" for kind, num in noted.items()]
        return told

    def phrase(self) -> str:
        """What a run's progress says beside its samples."""
        return f"{len(self.failed)} failed" if self.failed else ""
