"""Finds out whether an engine can hold layers on other nodes, and which RPC protocol it speaks.

`--help` lists `--rpc` in every build, so it proves nothing. What proves it: a server with one device, played here on
loopback, turns up in the engine's list of devices. The engine accepts an equal major and a minor up to its own, so the
announced version that it still accepts is its own.
"""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from agent.engine.ask import Answer

_HELLO, _DEVICE_COUNT, _DEVICE_MEMORY = 14, 15, 11
_REPLIES_AFTER_HELLO = {
    _DEVICE_COUNT: struct.pack("<I", 1),
    _DEVICE_MEMORY: struct.pack("<QQ", 1 << 32, 1 << 32),
}
_LONGEST_REQUEST = 1024
_MAJORS = (7, 8, 9, 6, 5)  # the one we build first; older engines greet in another form and count as unable
_MOST_MINORS = 8
_HANDSHAKE_S = 10.0

log = structlog.get_logger(__name__)

Ask = Callable[[tuple[str, ...]], Awaitable[Answer]]


async def rpc_protocol(ask: Ask) -> str | None:
    """Return "major.minor" of the RPC protocol that the engine speaks; None when it speaks none that we know.

    Args:
        ask: Runs the engine with these further arguments.
    """
    for major in _MAJORS:
        answer = await _accepts(ask, major, 0)
        if answer is None:
            return None
        if answer:
            return await _with_minor(ask, major)
    return None


async def _with_minor(ask: Ask, major: int) -> str | None:
    """A guess that is too low would keep this node apart from those with the same engine: None rather than that."""
    for minor in range(_MOST_MINORS):
        more = await _accepts(ask, major, minor + 1)
        if not more:
            return None if more is None else f"{major}.{minor}"
    return f"{major}.{_MOST_MINORS}"


async def _accepts(ask: Ask, major: int, minor: int) -> bool | None:
    """Whether the engine works with a server of this version; None when it never greeted one, or does not answer."""
    async with _fake_server(major, minor) as (port, greeted):
        answer = await _patient(ask, ("--rpc", f"127.0.0.1:{port}", "--list-devices"))
        if answer.status is None or not greeted.is_set():
            return None
        return answer.status == 0 and f"127.0.0.1:{port}" in answer.output


async def _patient(ask: Ask, more: tuple[str, ...]) -> Answer:
    """A busy machine can make an engine overdue once: that is no "cannot"."""
    answer = await ask(more)
    if answer.status is None:
        answer = await ask(more)
        if answer.status is None:
            hint = "this node neither lends nor borrows devices until the agent starts anew"
            log.warning("engine_rpc_unknown", problem=answer.trouble, hint=hint)
    return answer


@asynccontextmanager
async def _fake_server(major: int, minor: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Play an RPC server with one device on loopback: its port, and an event that says somebody greeted it."""
    greeted = asyncio.Event()
    conversations: set[asyncio.Task[None]] = set()
    hello = struct.pack("<4B24x", major, minor, 0, 0)

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                await _answer_requests(reader, writer, hello, greeted)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the engine left, which is how each of these conversations ends
        finally:
            writer.close()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(converse(reader, writer), name="rpc probe conversation")
        conversations.add(task)
        task.add_done_callback(conversations.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], greeted
    finally:
        server.close()
        for task in conversations:
            task.cancel()


async def _answer_requests(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: bytes, greeted: asyncio.Event
) -> None:
    """A request is its number, a size and that many bytes; a reply is a size and that many bytes."""
    while True:
        command, size = struct.unpack("<BQ", await reader.readexactly(9))
        if size > _LONGEST_REQUEST:
            return
        await reader.readexactly(size)
        if command == _HELLO:
            greeted.set()
        reply = hello if command == _HELLO else _REPLIES_AFTER_HELLO.get(command)
        if reply is None:
            return
        writer.write(struct.pack("<Q", len(reply)) + reply)
        await writer.drain()
