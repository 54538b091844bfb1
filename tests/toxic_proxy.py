"""A link that can be made bad: a TCP proxy in the test's own loop with latency, jitter, a limited rate, silence, resets.

    async with ToxicProxy(target).running() as proxy:
        proxy.latency_s = 0.01     # each way, so 20 ms round trip
        proxy.bytes_per_s = 5e6    # each way, all connections together, as on one cable
        proxy.freeze()             # half-open: accepts, keeps what there is, forwards nothing; `thaw` goes on
        proxy.reset()              # every connection ends with RST, new ones are accepted

What is set holds for bytes that arrive from then on. What it has read and not sent on is at most `HELD_BYTES` for each
connection and way, so that a slow link holds its sender back as a real one does.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK_BYTES = 4096
HELD_BYTES = 128 << 10
RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST


class ToxicProxy:
    """Listens on `host`, and a free port unless one is given; forwards to `target` (host, port)."""

    def __init__(self, target: tuple[str, int], *, host: str = "127.0.0.1", port: int = 0, seed: int = 0) -> None:
        self.target = target
        self.address = (host, port)
        self.latency_s = self.jitter_s = 0.0
        self.bytes_per_s: float | None = None
        self.accepted = 0
        self._random = random.Random(seed)
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._free_at_s = {"there": 0.0, "back": 0.0}  # when each way of the cable is free again
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ToxicProxy"]:
        server = await asyncio.start_server(self._accept, *self.address, limit=HELD_BYTES)
        self.address = server.sockets[0].getsockname()[:2]
        try:
            yield self
        finally:
            server.close()
            self.reset()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await server.wait_closed()

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    def reset(self) -> None:
        for task, writers in self._connections.items():
            for writer in writers:
                _reset(writer)
            task.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        writers = self._connections[task] = [writer]
        try:
            # Connected before anything is forwarded: frozen or not, the other side sees a connection.
            target_reader, target_writer = await asyncio.open_connection(*self.target, limit=HELD_BYTES)
            writers.append(target_writer)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._forward(reader, target_writer, "there"))
                ways.create_task(self._forward(target_reader, writer, "back"))
        except* (OSError, asyncio.CancelledError):  # one side broke off, or the test did: so does the other side
            for each in writers:
                _reset(each)
        finally:
            for each in writers:
                each.close()
            del self._connections[task]

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        held: deque[tuple[float, bytes]] = deque()
        changed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._take(reader, held, changed, way))
            tasks.create_task(self._give(writer, held, changed))

    async def _take(self, reader: asyncio.StreamReader, held: deque, changed: asyncio.Event, way: str) -> None:
        clock, last_s = asyncio.get_running_loop().time, 0.0
        while True:
            while len(held) * CHUNK_BYTES >= HELD_BYTES:
                changed.clear()
                await changed.wait()
            data = await reader.read(CHUNK_BYTES)
            now_s = clock()
            if self.bytes_per_s:
                self._free_at_s[way] = max(self._free_at_s[way], now_s) + len(data) / self.bytes_per_s
                now_s = self._free_at_s[way]
            last_s = max(last_s, now_s + self.latency_s + self._random.uniform(0, self.jitter_s))  # in order
            held.append((last_s, data))
            changed.set()
            if not data:
                return

    async def _give(self, writer: asyncio.StreamWriter, held: deque, changed: asyncio.Event) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while not held:
                changed.clear()
                await changed.wait()
            due_s, data = held[0]
            await asyncio.sleep(due_s - clock())
            await self._thawed.wait()
            held.popleft()
            changed.set()
            if not data:
                with contextlib.suppress(OSError):  # the other side has closed as well
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    found = writer.get_extra_info("socket")
    if found is not None and found.fileno() >= 0:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
