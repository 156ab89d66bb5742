"""The Ray that a run works on: that of RAY_ADDRESS, or a private one on this machine. Joined, watched, left."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reinforce import process, signals
from reinforce.errors import ConfigError, MissingExtra, ReinforceError
from reinforce.progress import tell

_ANSWER_S = 20.0  # for a cluster that is joined, and for its head when it is lost. Ray aborts after 60 s
_LOOK_S = 3.0


class Cluster:
    """`ray` is the module, connected."""

    def __init__(self, ray: Any, address: str | None) -> None:
        """`address`: RAY_ADDRESS, or None for a private Ray."""
        self.ray, self.where = ray, f"the cluster at {address}" if address else "this machine"
        self.head: str = ray.get_runtime_context().gcs_address
        self.lost = False
        self._answered = self._looked = time.monotonic()

    def has(self) -> str:
        """What there is, in words."""
        has, nodes = self.ray.cluster_resources(), sum(node["Alive"] for node in self.ray.nodes())
        gpus = f"{has['GPU']:g} GPUs" if has.get("GPU") else "no GPU"
        return f"{nodes} node{'s' * (nodes != 1)} with {has.get('CPU', 0):g} CPUs and {gpus}"

    def device(self, asked: str) -> str:
        """`cuda` or `cpu`, the same for all workers, decided by what the cluster has now. Ray has no public way to ask
        whether a cluster can grow, and on one that cannot, a run would wait for a GPU for ever. Raises ConfigError."""
        has = self.ray.cluster_resources()
        if has.get("GPU", 0) >= 1:
            return "cuda" if asked == "auto" else asked
        if asked == "cuda":
            raise ConfigError(
                f"device cuda was asked for, and Ray finds no GPU: {self.where} has {has.get('CPU', 0):g} CPUs "
                f"(nodes: {len(self.ray.nodes())}); ask for cpu, or add a node with a GPU. A cluster that grows on "
                "demand needs one GPU node when the run starts (KubeRay: minReplicas: 1)"
            )
        return "cpu"

    def check(self) -> None:
        """Raises ReinforceError where the head has not answered for long. What it is asked would wait, or abort."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        while fault := _silence(self.head):
            if time.monotonic() - self._answered > _ANSWER_S:
                self.lost = True
                raise ReinforceError(
                    f"Ray's head at {self.head} is lost: {fault}. What was written is whole; start the cluster again, "
                    "and run the same command again to go on"
                )
            time.sleep(1)
        self._answered = self._looked = time.monotonic()


@contextlib.contextmanager
def joined(num_workers: int) -> Iterator[Cluster]:
    """The cluster of RAY_ADDRESS where it is set, else a private one on this machine, never a remembered one.

    Raises ConfigError where it cannot be joined, MissingExtra.
    """
    process.ray_environment()
    try:
        import ray
    except ImportError:
        raise MissingExtra(
            "Ray is not installed: pip install 'clip-reinforce[reinforce]', or use --workers 0 to work without it"
        ) from None
    if ray.is_initialized():
        raise ConfigError("this process has started Ray already; use workers=0, or call ray.shutdown() before")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS") or None
    cluster: Cluster | None = None
    try:
        # Ray puts the folder where it is started first on its workers' module path, and there a user's own train.py
        # would stand in the way of our package. Started in the folder of our packages, workers find the driver's code.
        with contextlib.chdir(Path(__file__).parents[2]):
            if address:
                tell(f"Ray: joining the cluster at {address}")
                _join(ray, address, quiet)
            else:
                tell("Ray: starting on this machine")
                num_cpus = max(os.cpu_count() or 1, min(num_workers, 1024))
                ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
        signals.take_again()
        cluster = Cluster(ray, address)
        yield cluster
    finally:
        # It may hang, or abort: after a signal, which its processes may have had as well, and without a head.
        if not signals.number() and not (cluster and cluster.lost):
            ray.shutdown()


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    place = address.rpartition("://")[2]
    until = time.monotonic() + _ANSWER_S
    while ":" in place and (fault := _silence(place)):  # Ray itself tries for minutes, and ends in a trace
        if time.monotonic() > until:
            raise ConfigError(
                f"nobody answers at RAY_ADDRESS={address}: {fault}; see that the cluster is up (`ray status` on its "
                "head), or unset RAY_ADDRESS to work on this machine alone"
            )
        time.sleep(1)
    try:
        ray.init(**quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"the Ray cluster at RAY_ADDRESS={address} cannot be joined: {str(error).splitlines()[0]}; see that this "
            "machine is one of its nodes (`ray start --address=..`), and that RAY_AUTH_MODE is the same word on all of "
            "them (docs/cluster.md)"
        ) from error


def _silence(place: str) -> str:
    """Why nobody answers at HOST:PORT, or nothing."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        return str(error)
    return ""
