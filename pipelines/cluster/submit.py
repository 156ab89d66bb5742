"""Send a command as a job to a Ray cluster, and follow it: `make submit`. It ends with the job's exit code; Ctrl-C
leaves the job running.

`ray job submit` does the same. Where nobody answers, or a cluster has just been started, it ends in a traceback.
"""

import argparse
import asyncio
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from reinforce import process
from reinforce.errors import ConfigError, ReinforceError
from reinforce.lines import say
from reinforce.progress import tell
from reinforce.terminal import errors_as_sentences

ANSWER_S = 60.0  # for a cluster that is being started: its nodes take jobs some seconds after its head answers
RUNTIME_ENV = Path(__file__).with_name("runtime_env.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="http://HEAD:8265")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what is run there, with this checkout at hand")
    asked = parser.parse_args()
    process.ray_environment()
    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells of each file that it leaves out
    with errors_as_sentences():
        sys.exit(submit(asked.address, asked.command))


def submit(address: str, command: list[str]) -> int:
    """The job's exit code. Raises ConfigError where the cluster does not take the job, ReinforceError where it is lost
    from sight."""
    environment = yaml.safe_load(RUNTIME_ENV.read_text()) | {"working_dir": str(RUNTIME_ENV.parents[2])}
    client, job = _sent(address, entrypoint=shlex.join(command), runtime_env=environment)
    tell(f"job {job} at {address}; it goes on without this command: ray job logs|stop {job} --address {address}")
    try:
        asyncio.run(_follow(client, job))
        info = client.get_job_info(job)
    except KeyboardInterrupt:
        tell(f"job {job} goes on")
        return 130
    except (OSError, RuntimeError) as error:
        raise ReinforceError(f"the connection to {address} is lost ({error}); job {job} goes on if it can") from error
    if info.status == JobStatus.SUCCEEDED:
        return 0
    tell(f"job {job}: {info.status.lower()}: {(info.message or '').partition(chr(10))[0]}")
    return info.driver_exit_code or 1


def _sent(address: str, **job: Any) -> tuple[JobSubmissionClient, str]:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} takes no jobs: they go to the cluster's dashboard, RAY_ADDRESS=http://HEAD:8265; HEAD:6379 is "
            "for `RAY_ADDRESS=HEAD:6379 clip-reinforce run ..` on one of its nodes"
        )
    until, told = time.monotonic() + ANSWER_S, False
    while True:
        try:
            client = JobSubmissionClient(address)
            return client, client.submit_job(**job)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            can_come = isinstance(error, ConnectionError) or "No available agent" in reason
            if not can_come or time.monotonic() > until:
                raise ConfigError(
                    f"the cluster at {address} takes no job: {reason}; see that it is up (`ray status` on its head), "
                    "that this is its dashboard's address (http://HEAD:8265), and that RAY_AUTH_MODE is the same word "
                    "here and there (docs/cluster.md)"
                ) from None
        if not told:
            tell(f"waiting for the cluster at {address}: {reason}")
            told = True
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        say(*lines.rstrip("\n").split("\n"))


if __name__ == "__main__":
    main()
