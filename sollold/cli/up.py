"""`sollol up`: private Redis, head and agents on one machine, in the foreground, gone without a trace afterwards."""

import argparse
import asyncio
import os
import shutil
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from sollol import log
from sollol.directories import directories, private, runtime_directory
from sollol.errors import Reason, refuse

from sollold.__main__ import DEFAULT_FILE
from sollold.cli.children import Child, is_error, readable
from sollold.cli.keys import default_path
from sollold.cli.machine import check_port, http_status, unequal_caps
from sollold.cli.orphans import adopt_orphans, end_orphans
from sollold.cli.private_redis import private_redis

READY_WITHIN_S = 60.0
HEAD_STOP_S = 15.0  # its own grace for running streams is 10 s
AGENT_STOP_S = 15.0  # engines get 5 s to end, then they are killed
POLL_S = 0.1
HOST = "127.0.0.1"
HEAD_MODULE = "sollold"
AGENT_MODULE = "agent"
# The files in /etc/sollol are the services', and not for every user to read.
_OWN_SETTINGS = ("--config", os.devnull)


def up(options: argparse.Namespace) -> int:
    """Exit status 0 after Ctrl-C or SIGTERM, 6 when a port is taken or a child ended by itself."""
    for port in (options.http_port, options.grpc_port, *_agent_ports(options)):
        check_port(HOST, port)
    for directory in options.models:
        model_directory(directory)
    log.configure("warning", "console")
    adopt_orphans()
    try:
        return asyncio.run(_Up(options).run())
    finally:
        for orphan in end_orphans():
            sys.stderr.write(f"killed {orphan}, left by a daemon that did not end in order\n")


def _agent_ports(options: argparse.Namespace) -> list[int]:
    return [options.agent_port + at for at in range(options.agents)]


class _Up:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        name = f"up-{options.http_port}"  # two of us side by side have different ports
        if options.state:
            self._state = Path(options.state).expanduser().absolute()
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            self._state = private(directories(os.environ).state / name)
        self._run = private(runtime_directory(os.environ) / name)
        self._logs = self._state / "log"
        self._stop = asyncio.Event()
        self._head: Child | None = None
        self._agents: list[Child] = []

    async def run(self) -> int:
        self._handle_signals()
        async with AsyncExitStack() as stack:
            stack.callback(shutil.rmtree, self._run, ignore_errors=True)  # sockets only; state and logs stay
            redis_url = self._options.redis_url or await stack.enter_async_context(
                private_redis(private(self._run / "redis"))
            )
            stack.callback(self._show_new_lines)  # what they said while they stopped
            stack.push_async_callback(self._stop_children)  # before Redis goes
            await self._start_children(redis_url)
            shown = asyncio.create_task(self._show_logs(), name="show logs")
            try:
                await self._serve()
            finally:
                shown.cancel()
        return 0

    async def _start_children(self, redis_url: str) -> None:
        caps = unequal_caps(self._options.agents)
        for at, port in enumerate(_agent_ports(self._options)):
            name = f"node-{at + 1}"
            flags = self._agent_flags(name, port, redis_url, caps[at])
            environ, log_file = self._environ("SOLLOL_AGENT"), self._logs / f"{name}.log"
            self._agents.append(await Child.start(name, AGENT_MODULE, flags, log_file, environ))
        environ, log_file = self._environ("SOLLOL_HEAD"), self._logs / "head.log"
        self._head = await Child.start("head", HEAD_MODULE, self._head_flags(redis_url), log_file, environ)

    def _environ(self, prefix: str) -> dict[str, str]:
        """The broker's address may hold a password, and anybody can read a command line."""
        return {f"{prefix}_MQTT_URL": self._options.mqtt_url} if self._options.mqtt_url else {}

    def _head_flags(self, redis_url: str) -> list[str]:
        return [
            *_OWN_SETTINGS,
            *("--listen", HOST, "--http-port", str(self._options.http_port)),
            *("--grpc-port", str(self._options.grpc_port), "--redis-url", redis_url),
            *("--log-format", "json", "--exit-with-parent", "--tls-dir", "", "--state-dir", str(self._state / "head")),
            *(["--mqtt-inference"] if self._options.mqtt_inference else []),
            *("--keys-file", str(keys_file())),
        ]

    def _agent_flags(self, name: str, port: int, redis_url: str, cap_bytes: int | None) -> list[str]:
        flags = [
            *_OWN_SETTINGS,
            *("--node-id", name, "--host", HOST, "--listen", HOST, "--port", str(port), "--redis-url", redis_url),
            *("--state-dir", str(self._state / name), "--log-dir", str(self._logs / f"{name}-engines")),
            *("--run-dir", str(private(self._run / name)), "--log-format", "json", "--exit-with-parent"),
            *("--tls-dir", ""),  # this machine's certificates, if it has some, are for the cluster it belongs to
        ]
        for directory in self._options.models:
            flags += ["--model-dirs", model_directory(directory)]
        if self._options.engine:
            flags += ["--engine", str(Path(self._options.engine).expanduser().absolute())]
        if cap_bytes is not None:
            flags += ["--caps", f"CPU={cap_bytes}"]
        return flags

    async def _serve(self) -> None:
        """Until a signal comes or a child ends; what a child's end means is told by the raised refusal."""
        stop = asyncio.create_task(self._stop.wait(), name="await stop")
        ready = asyncio.create_task(self._await_ready(), name="await ready")
        ends = {asyncio.create_task(child.wait(), name=f"await {child.name}"): child for child in self._children()}
        waiting: set[asyncio.Task[Any]] = {stop, ready, *ends}
        try:
            while True:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if stop in done:
                    return
                for end, child in ends.items():
                    if end in done:
                        raise self._child_ended(child, end.result())
                await ready
                self._announce()
        finally:
            for task in (stop, ready, *ends):
                task.cancel()

    def _child_ended(self, child: Child, status: int) -> Exception:
        return refuse(
            Reason.ENGINE_DIED,
            f"{child.name} ended by itself with status {status}; everything is stopped. Its log: {child.log_file}",
            log_lines=tuple(f"{child.name} | {line}" for line in child.last_lines()),
        )

    async def _await_ready(self) -> None:
        port = self._options.http_port
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                while await http_status(HOST, port, "/readyz") != 200 or not await self._all_nodes_seen():  # noqa: ASYNC110 - no event, it is another process
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            message = f"not ready within {READY_WITHIN_S:g} s; the logs are in {self._logs}"
            raise refuse(Reason.LOAD_TIMEOUT, message) from None

    async def _all_nodes_seen(self) -> bool:
        """One node makes the head ready; with several, whoever reads our URLs shall find them all."""
        if self._options.agents == 1:
            return True
        from sollol.client import Client

        async with Client(f"{HOST}:{self._options.grpc_port}") as client:
            return bool(len(await client.nodes()) >= self._options.agents)

    def _announce(self) -> None:
        options = self._options
        nodes = ", ".join(child.name for child in self._agents)
        sys.stdout.write(
            f"SOLLOL is ready: {nodes}\n"
            f"  OpenAI API  http://{HOST}:{options.http_port}/v1\n"
            f"  gRPC        {HOST}:{options.grpc_port}\n"
            f"  logs        {self._logs}\n"
            "Ctrl-C stops everything.\n"
        )
        sys.stdout.flush()

    def _children(self) -> list[Child]:
        return [*([self._head] if self._head else []), *self._agents]

    async def _stop_children(self) -> None:
        """The head first, so that no new work comes, then all agents at once: they stop their engines."""
        if self._head is not None:
            await self._stop_child(self._head, HEAD_STOP_S)
        await asyncio.gather(*(self._stop_child(agent, AGENT_STOP_S) for agent in self._agents))

    async def _stop_child(self, child: Child, within_s: float) -> None:
        if not await child.stop(within_s=within_s):
            sys.stderr.write(f"{child.name} did not stop within {within_s:g} s and was killed\n")

    def _handle_signals(self) -> None:
        """The first signal stops in order, the second one kills."""
        loop = asyncio.get_running_loop()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # under nohup it is ignored, and stays so
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            for child in self._children():
                child.kill()
            return
        sys.stderr.write("stopping\n")
        self._stop.set()

    async def _show_logs(self) -> None:
        while True:
            self._show_new_lines()
            await asyncio.sleep(POLL_S)

    def _show_new_lines(self) -> None:
        for child in self._children():
            for line in child.new_lines():
                if self._options.verbose or is_error(line):
                    sys.stderr.write(f"{child.name} | {readable(line)}\n")


def keys_file() -> Path:
    """Where `sollol keys` writes on this machine; this user's own, where the services' settings are not for us to read.

    Raises:
        ConfigError: the settings make no sense.
    """
    readable = os.access(DEFAULT_FILE, os.R_OK, effective_ids=True)
    return default_path(DEFAULT_FILE if readable else Path(os.devnull))


def model_directory(given: str) -> str:
    """Raises SollolError(INVALID_REQUEST) unless it is a directory that a list of directories can name."""
    path = Path(given).expanduser().absolute()
    if not path.is_dir():
        raise refuse(Reason.INVALID_REQUEST, f"--models {given}: is no directory")
    if "," in str(path):
        raise refuse(Reason.INVALID_REQUEST, f"--models {given}: a comma in the path is not supported, use a link")
    return str(path)
