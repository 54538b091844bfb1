"""The seed's own cluster: a head with a small agent on .10, a large node on .20, two more on .21 and .22."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from sollold.pki.authority import Authority, new_authority
from tests.certificates import write_identity
from tests.cluster.ask import Answer, Question
from tests.cluster.network import Host, network, processes_in
from tests.kept_bandwidth import keep_bandwidth
from tests.waiting import LOOK_AT_MOST_S

HEAD = "192.168.1.10"
LARGE = "192.168.1.20"
ADDRESSES = (HEAD, LARGE, "192.168.1.21", "192.168.1.22")
REDIS_PORT = 6379
AGENT_PORT = 7462
ENGINE_THREADS = 1
UP_WITHIN_S = 90.0
ENGINES = ("llama-server", "ggml-rpc-server")
FORWARDERS = frozenset({"agent.forwarder", "agent.tunnel"})
ROOT = Path(__file__).parents[2]


@dataclass
class Cluster:
    """Daemons by name (`head`, `redis`, or an address); `sollol` runs the operator's command on the head's host."""

    hosts: Mapping[str, Host]
    directory: Path
    authority: Authority | None = None
    """Whose certificates everybody has; None for plaintext."""
    daemons: dict[str, Any] = field(default_factory=dict)

    def sollol(self, *arguments: str, timeout_s: float = 90.0) -> Any:
        head = ("--head", f"{HEAD}:7461", "--tls-dir", self.tls_dir("admin", "operator"))
        return self.hosts[HEAD].run(sys.executable, "-P", "-m", "sollold.cli", *head, *arguments, timeout_s=timeout_s)

    def tls_dir(self, role: str, name: str) -> str:
        """The directory of a certificate, made when it is first asked for; empty in a cluster without."""
        directory = self.directory / "pki" / f"{role}-{name}"
        if self.authority is None:
            return ""
        if not directory.exists():
            write_identity(directory, self.authority, role, name)
        return str(directory)

    def nodes(self) -> list[dict[str, Any]]:
        """What `sollol nodes --json` says; empty while the head does not answer."""
        done = self.sollol("nodes", "--json")
        return json.loads(done.stdout)["nodes"] if done.returncode == 0 else []

    def start_agent(
        self,
        address: str,
        *,
        caps: Mapping[str, int],
        model_dirs: tuple[str, ...],
        engine: str,
        more: Sequence[str] = (),
    ) -> None:
        node = f"node-{address.rsplit('.', 1)[1]}"
        flags = [
            *("--node-id", node, "--host", address, "--listen", address),
            *(("--tls-dir", self.tls_dir("agent", node)) if self.authority else ("--insecure",)),
            *("--redis-url", f"redis://{HEAD}:{REDIS_PORT}/0", "--engine", engine, "--threads", str(ENGINE_THREADS)),
            *("--ollama-dir", "", "--huggingface-dir", "", "--log-format", "json"),
            *self._directories(address),
        ]
        for directory in model_dirs or ("/nonexistent",):
            flags += ["--model-dirs", directory]
        for device, cap_bytes in caps.items():
            flags += ["--caps", f"{device}={cap_bytes}"]
        self._start(address, address, "agent", *flags, *more)

    def start_head(self, *flags: str, host: str = HEAD, name: str = "head") -> None:
        # insecure, since its HTTP asks for no keys
        self._start(
            name, host, "sollold", "--listen", host, "--host", host, "--insecure", "--log-format", "json",
            "--tls-dir", self.tls_dir("head", name), "--state-dir", str(self.directory / f"{name}-state"),
            "--redis-url", f"redis://{HEAD}:{REDIS_PORT}/0", *flags,
        )  # fmt: skip

    def ask(self, questions: Sequence[Question], *, timeout_s: float = 90.0) -> list[Answer]:
        """Ask all at once, each its own head, and wait for all answers."""
        asked = self.hosts[HEAD].run(
            sys.executable, "-m", "tests.cluster.ask", self.tls_dir("client", "users"),
            timeout_s=timeout_s, cwd=ROOT, input=msgspec.json.encode(questions).decode(),
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        return msgspec.json.decode(asked.stdout, type=list[Answer])

    def engines(self) -> dict[str, list[str]]:
        """Command lines of engines, lending processes and forwarders that run, by address."""
        found = {address: list(_engines_in(host.namespace)) for address, host in self.hosts.items()}
        return {address: running for address, running in found.items() if running}

    def reserved(self) -> dict[str, list[str]]:
        """Pools with a reservation, by node, as the head sees it."""
        held = {
            node["report"]["node_id"]: [item["pool_id"] for item in node["report"].get("reservations", ())]
            for node in self.nodes()
        }
        return {node_id: pools for node_id, pools in held.items() if pools}

    def seen(self, addresses: Collection[str]) -> None:
        """Wait until the head sees exactly these nodes. Its log tells first: a command costs a second of CPU."""

        def told() -> bool:
            log = self.log_of("head")
            return all(f'"node_connected","node":"node-{each.rsplit(".", 1)[1]}"' in log for each in addresses)

        await_true(told, UP_WITHIN_S, lambda: f"the head has met {addresses}")
        await_true(lambda: len(self.nodes()) == len(addresses), UP_WITHIN_S, "the head sees every node")

    def nothing_left(self, within_s: float = 20.0) -> None:
        """Wait until nothing is reserved anywhere and no engine runs."""
        await_true(
            lambda: not self.engines() and not self.reserved(),
            within_s,
            lambda: f"nothing is left, but {self.engines()} {self.reserved()}",
        )

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
        keep_bandwidth(base / "state", threads=ENGINE_THREADS)
        return [part for kind in ("state", "log", "run") for part in (f"--{kind}-dir", str(base / kind))]

    def _start(self, name: str, address: str, module: str, *flags: str) -> None:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("SOLLOL_")}
        self.daemons[name] = self.hosts[address].spawn(
            sys.executable, "-P", "-m", module, *flags, log=self.directory / f"{name}.log", environ=environ
        )


@contextlib.contextmanager
def seed_cluster(
    directory: Path,
    *,
    caps: Mapping[str, int],
    model_dir: Path,
    engine: Path,
    head_flags: tuple[str, ...] = (),
    agent_flags: tuple[str, ...] = (),
    model_hosts: Sequence[str] = (LARGE,),
    prepare: Callable[[Cluster], None] = lambda _: None,
    tls: bool = False,
) -> Iterator[Cluster]:
    """Start the whole cluster and yield it once the head sees every node.

    Args:
        directory: For logs, states and sockets; keep its path short.
        caps: Address to the most bytes that the agent there may use of its CPU.
        prepare: Called before anything is started.
        tls: With certificates and mutual TLS, else in plaintext.
        model_dir: Where the nodes of `model_hosts` (the large one, .20) have their models; the others have none.
    """
    with network(ADDRESSES) as hosts:
        cluster = Cluster({host.address: host for host in hosts}, directory, new_authority("seed") if tls else None)
        try:
            prepare(cluster)
            cluster.start_redis()
            cluster.start_head(*head_flags)
            for address in caps:
                models = (str(model_dir),) if address in model_hosts else ()
                cluster.start_agent(
                    address, caps={"CPU": caps[address]}, model_dirs=models, engine=str(engine), more=agent_flags
                )
            cluster.seen(caps)
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
            process.wait()


def _engines_in(namespace: str) -> Iterator[str]:
    for pid in processes_in(namespace):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(program).name in ENGINES or FORWARDERS.intersection(arguments):
                yield " ".join((program, *arguments))


def await_true(condition: Callable[[], object], within_s: float, what: str | Callable[[], str]) -> None:
    """As `wait_until`, for whoever has no event loop; a look may take as long as a command does."""
    waited_s, before_s = 0.0, time.monotonic()
    while True:
        overdue = waited_s > within_s
        if condition():
            return
        assert not overdue, f"not within {within_s} s: {what if isinstance(what, str) else what()}"
        time.sleep(0.05)
        now_s = time.monotonic()
        waited_s, before_s = waited_s + min(now_s - before_s, LOOK_AT_MOST_S), now_s
