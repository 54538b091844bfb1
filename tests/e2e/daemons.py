"""Starts real clusters as child processes: with `sollol up`, or daemon by daemon."""

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.e2e.cluster import ENGINE_THREADS, READY_WITHIN_S, Cluster
from tests.kept_bandwidth import keep_bandwidth
from tests.redis_fixture import redis_command, wait_for_redis
from tests.waiting import wait_until

STOPPED_WITHIN_S = 40


class Up(Cluster):
    """One `sollol up`."""

    def __init__(
        self,
        home: Path,
        ports: Callable[[], int],
        *,
        models: Path,
        engine: Path,
        agents: int,
        words: Sequence[str] = (),
        environ: dict[str, str] | None = None,
    ) -> None:
        super().__init__(home, ports, environ)
        self._output, self._errors = home / "up.out", home / "up.err"
        for at in range(agents):
            keep_bandwidth(self.state / f"node-{at + 1}", threads=ENGINE_THREADS)
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [
                    *_leaving_with_us(),
                    *(sys.executable, "-P", "-m", "sollold.cli", "up", "--models", str(models)),
                    *("--agents", str(agents), "--engine", str(engine), "--state", str(self.state)),
                    *("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)),
                    *("--agent-port", str(neighbouring(ports, agents)), *words),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=self.environ,
                start_new_session=True,
            )

    def run_dir(self, node: str) -> Path:
        return self.home / "run" / "sollol" / f"up-{self.http_port}" / node

    @property
    def redis_socket(self) -> Path:
        return self.run_dir("redis") / "redis.sock"

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text(errors="replace")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while "Ctrl-C" not in self.output:
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.errors}"
            assert time.monotonic() < deadline, f"not ready within {READY_WITHIN_S} s: {self.errors}"
            time.sleep(0.02)

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, STOPPED_WITHIN_S)

    def close(self) -> None:
        _ended(self.process)


class ByHand(Cluster):
    """The same daemons, each started by the test, so that it can end each alone."""

    def __init__(
        self,
        home: Path,
        ports: Callable[[], int],
        *,
        models: Path,
        engine: Path,
        environ: dict[str, str] | None = None,
    ) -> None:
        super().__init__(home, ports, environ)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._models, self._engine = models, engine
        self._ports: dict[str, int] = {}
        self._new_port = ports
        self.redis_url = f"unix://{self.redis_socket}"

    def start_redis(self) -> None:
        server = shutil.which("redis-server") or shutil.which("valkey-server")
        assert server, "no redis-server on PATH"
        self._start("redis", redis_command(server, self.redis_socket))
        wait_for_redis(self.redis_url)

    def start_head(self, *flags: str) -> subprocess.Popen[bytes]:
        ports = ("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port))
        return self._daemon("head", "sollold", *ports, *flags)

    def start_another_head(self, name: str, *flags: str) -> str:
        """Returns where its HTTP is."""
        http_port, grpc_port = self._new_port(), self._new_port()
        self._daemon(name, "sollold", "--http-port", str(http_port), "--grpc-port", str(grpc_port), *flags)
        return f"http://127.0.0.1:{http_port}"

    def start_agent(self, node: str, *flags: str) -> subprocess.Popen[bytes]:
        """Start it, or start it again with the same port and directories."""
        if node not in self._ports:
            self._ports[node] = self._new_port()
        keep_bandwidth(self.state / node, threads=ENGINE_THREADS)
        places = ("--state-dir", self.state / node, "--log-dir", self.log_dir(node), "--run-dir", self.run_dir(node))
        names = ("--node-id", node, "--port", str(self._ports[node]), "--model-dirs", str(self._models))
        return self._daemon(node, "agent", *names, "--engine", str(self._engine), *map(str, places), *flags)

    def port_of(self, node: str) -> int:
        return self._ports[node]

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")

    def _daemon(self, name: str, module: str, *flags: str) -> subprocess.Popen[bytes]:
        common = ("--redis-url", self.redis_url, "--log-format", "json")
        return self._start(name, [sys.executable, "-P", "-m", module, *common, *flags])

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [*_leaving_with_us(), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def close(self) -> None:
        """The head first, Redis last, as an operator would."""
        for name in sorted(self.processes, key=lambda name: (name != "head", name == "redis")):
            _ended(self.processes[name])


@contextmanager
def short_home() -> Iterator[Path]:
    """A directory whose path leaves room for sockets' names; pytest's own can be too long."""
    with tempfile.TemporaryDirectory(prefix="sollol-e2e-") as home:
        yield Path(home)


def neighbouring(ports: Callable[[], int], count: int) -> int:
    """The first of `count` free ports in a row."""
    run = [ports()]
    while len(run) < count:
        port = ports()
        run = [*run, port] if port == run[-1] + 1 else [port]
    return run[0]


def _leaving_with_us() -> list[str]:
    """What a command begins with to be asked to end when the tests are killed: a whole cluster would stay otherwise."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv else []


def _ended(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def family(pid: int) -> list[psutil.Process]:
    """The process and all below it, as they are now."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def running(processes: Iterable[psutil.Process]) -> list[str]:
    """The command lines of those that have not ended."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return found


async def gone(processes: list[psutil.Process], within_s: float, what: str) -> None:
    """Wait until every one of them has ended."""
    try:
        await wait_until(lambda: not running(processes), within_s=within_s, what=what)
    except AssertionError as error:
        raise AssertionError(f"{error}; left: {running(processes)}") from None
