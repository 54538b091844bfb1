"""Forwarders and tunnels as the processes they are, and backends that say what a test wants."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from agent.forwarder.status import Status, read_status
from agent.tunnel.status import RouteStatus, TunnelStatus, read_tunnel_status
from tests.waiting import wait_until

MIB = 1 << 20


class Forwarding:
    """A running forwarder and what it says of itself."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.process, self._directory = process, directory

    @property
    def status(self) -> Status:
        status = read_status(self._directory / "status")
        assert status is not None
        return status

    async def connect(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.status.port, local_addr=(source, 0))

    async def ended(self, within_s: float = 10) -> str:
        assert await asyncio.wait_for(self.process.wait(), within_s) == 0
        return self.status.ended

    def logged(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self._directory / "log").read_text().splitlines()]


class Backend:
    """Serves one connection after the other, as the real one does, with a conversation of the test's choice."""

    def __init__(self, converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> None:
        self._converse, self._turn = converse, asyncio.Lock()
        self.port = self.served = self.most = self.open = 0
        self.links: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.links[asyncio.current_task()] = writer
        self.open += 1
        self.most = max(self.most, self.open)
        async with self._turn:
            self.served += 1
            await self._converse(reader, writer)
            writer.close()
        self.open -= 1


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return


@asynccontextmanager
async def backend_that(converse=echo) -> AsyncIterator[Backend]:
    backend = Backend(converse)
    server = await asyncio.start_server(backend.serve, "127.0.0.1", 0)
    backend.port = server.sockets[0].getsockname()[1]
    async with server:
        yield backend
    for serving, writer in backend.links.items():
        if not serving.done():  # else it has closed its connection, and asyncio aborts no closed one
            writer.transport.abort()
    await asyncio.wait_for(asyncio.gather(*backend.links), 5)


def argv(directory: Path, target: int, **given: object) -> list[str]:
    flags: dict[str, object] = {"listen": "127.0.0.1:18500-18599", "target": f"127.0.0.1:{target}"}
    flags |= {"attach_within": 20, "gone_after": 20, "status": directory / "status"} | given
    if not {"tls", "own_user"} & set(given):
        flags.setdefault("allow", "127.0.0.1")
    return [sys.executable, "-P", "-m", "agent.forwarder", *words_of(flags)]


def words_of(flags: dict[str, object]) -> list[str]:
    """Flags as they stand on a command line; True stands for one without a value."""
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@asynccontextmanager
async def forwarding(directory: Path, target: int, **given: object) -> AsyncIterator[Forwarding]:
    secret = given.pop("secret", b"")
    log = given.pop("log", directory / "log")
    with log.open("wb") as output:
        process = await whispered_to(secret, *argv(directory, target, **given), stderr=output)
    forwarding = Forwarding(process, directory)
    try:
        await wait_until(lambda: read_status(directory / "status"), within_s=10, what="it listens")
        yield forwarding
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ask(link: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes) -> bytes:
    reader, writer = link
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 5)


async def is_cut(link: tuple[asyncio.StreamReader, asyncio.StreamWriter], within_s: float = 5) -> bool:
    try:
        return await asyncio.wait_for(link[0].read(1), within_s) == b""
    except ConnectionError:
        return True
    finally:
        link[1].close()


class Tunnelling:
    """A running tunnel with one route."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        self.process, self._directory = process, directory

    @property
    def status(self) -> TunnelStatus:
        status = read_tunnel_status(self._directory / "tunnel-status")
        assert status is not None
        return status

    @property
    def route(self) -> RouteStatus:
        return self.status.routes[0]

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.route.port)

    async def ended(self, within_s: float = 10) -> str:
        assert await asyncio.wait_for(self.process.wait(), within_s) == 0
        return self.status.ended

    def logged(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self._directory / "tunnel-log").read_text().splitlines()]


@asynccontextmanager
async def tunnelling(
    directory: Path, port: int, to: tuple[str, int], *, lender: str, secret: bytes, **given: object
) -> AsyncIterator[Tunnelling]:
    """A tunnel whose `port` leads to the forwarder at `to`; `given` needs `tls` and `pool`."""
    flags = {"route": f"{port}={to[0]}:{to[1]}={lender}", "attach_within": 20, "gone_after": 20} | given
    words = words_of(flags | {"status": directory / "tunnel-status"})
    with (directory / "tunnel-log").open("wb") as output:
        process = await whispered_to(secret, sys.executable, "-P", "-m", "agent.tunnel", *words, stderr=output)
    tunnel = Tunnelling(process, directory)
    try:
        await wait_until(lambda: read_tunnel_status(directory / "tunnel-status"), within_s=10, what="it listens")
        yield tunnel
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def whispered_to(told: bytes, *argv: str, stderr: object) -> asyncio.subprocess.Process:
    """A process with these bytes, and nothing more, on its standard input."""
    process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE, stderr=stderr, cwd="/")
    assert process.stdin is not None
    process.stdin.write(told)
    process.stdin.close()
    return process
