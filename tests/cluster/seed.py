"""The seed's own cluster: a head with a small agent on .10, a large node on .20, two more on .21 and .22."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.network import Host, network

HEAD = "192.168.1.10"
ADDRESSES = (HEAD, "192.168.1.20", "192.168.1.21", "192.168.1.22")
REDIS_PORT = 6379
AGENT_PORT = 7462
UP_WITHIN_S = 30.0


@dataclass
class Cluster:
    """Daemons by name (`head`, `redis`, or an address); `sollol` runs the operator's command on the head's host."""

    hosts: Mapping[str, Host]
    directory: Path
    daemons: dict[str, Any] = field(default_factory=dict)

    def sollol(self, *arguments: str, timeout_s: float = 90.0) -> Any:
        head = ("--head", f"{HEAD}:7461")
        return self.hosts[HEAD].run(sys.executable, "-P", "-m", "sollold.cli", *head, *arguments, timeout_s=timeout_s)

    def nodes(self) -> list[dict[str, Any]]:
        """What `sollol nodes --json` says; empty while the head does not answer."""
        done = self.sollol("nodes", "--json")
        return json.loads(done.stdout)["nodes"] if done.returncode == 0 else []

    def start_agent(self, address: str, *, caps: Mapping[str, int], model_dirs: tuple[str, ...], engine: str) -> None:
        flags = [
            *("--node-id", f"node-{address.rsplit('.', 1)[1]}", "--host", address, "--listen", address, "--insecure"),
            *("--redis-url", f"redis://{HEAD}:{REDIS_PORT}/0", "--engine", engine, "--threads", "1"),
            *("--ollama-dir", "", "--huggingface-dir", "", "--log-format", "json"),
            *self._directories(address),
        ]
        for directory in model_dirs or ("/nonexistent",):
            flags += ["--model-dirs", directory]
        for device, cap_bytes in caps.items():
            flags += ["--caps", f"{device}={cap_bytes}"]
        self._start(address, address, "agent", *flags)

    def start_head(self, *flags: str) -> None:
        self._start(
            "head", HEAD, "sollold", "--listen", HEAD, "--host", HEAD, "--insecure", "--log-format", "json",
            "--redis-url", f"redis://{HEAD}:{REDIS_PORT}/0", *flags,
        )  # fmt: skip

    def start_redis(self) -> None:
        log = self.directory / "redis.log"
        self.daemons["redis"] = self.hosts[HEAD].spawn(
            "redis-server", "--bind", HEAD, "--port", str(REDIS_PORT), "--protected-mode", "no", "--save", "",
            log=log, environ={},
        )  # fmt: skip

    def log_of(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def _directories(self, address: str) -> list[str]:
        base = self.directory / address
        base.mkdir(exist_ok=True)
        return [part for kind in ("state", "log", "run") for part in (f"--{kind}-dir", str(base / kind))]

    def _start(self, name: str, address: str, module: str, *flags: str) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SOLLOL_")}
        self.daemons[name] = self.hosts[address].spawn(
            sys.executable, "-P", "-m", module, *flags, log=self.directory / f"{name}.log", environ=environ
        )


@contextlib.contextmanager
def seed_cluster(
    directory: Path, *, caps: Mapping[str, int], model_dir: Path, engine: Path, head_flags: tuple[str, ...] = ()
) -> Iterator[Cluster]:
    """Start the whole cluster and yield it once the head sees every node.

    Args:
        directory: For logs, states and sockets; keep its path short.
        caps: Address to the most bytes that the agent there may use of its CPU.
        model_dir: Where the large node (.20) has its models; the other nodes have none.
    """
    with network(ADDRESSES) as hosts:
        cluster = Cluster({host.address: host for host in hosts}, directory)
        try:
            cluster.start_redis()
            cluster.start_head(*head_flags)
            for address in caps:
                models = (str(model_dir),) if address == "192.168.1.20" else ()
                cluster.start_agent(address, caps={"CPU": caps[address]}, model_dirs=models, engine=str(engine))
            await_true(lambda: len(cluster.nodes()) == len(caps), UP_WITHIN_S, "the head sees every node")
            yield cluster
        finally:
            _stop(cluster)


def _stop(cluster: Cluster) -> None:
    for process in cluster.daemons.values():
        process.terminate()
    for process in cluster.daemons.values():
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def await_true(condition: Callable[[], object], within_s: float, what: str) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.05)
