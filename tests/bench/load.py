"""Readers of many streams at once, which measure how long each token took since the source sent it."""

import asyncio
import json
import re
import time
from array import array
from dataclasses import dataclass, field

_SENT = re.compile(rb'"t":(\d+)')


@dataclass
class Measured:
    """Nanoseconds per token, of the tokens that arrived while `counting`."""

    delays_ns: array = field(default_factory=lambda: array("q"))
    counting: bool = False
    streams: int = 0
    ended: int = 0
    failed: int = 0

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.delays_ns)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1e6 if ordered else float("nan")


class Reader(asyncio.Protocol):
    def __init__(self, request: bytes, measured: Measured) -> None:
        self._request = request
        self._measured = measured
        self._first = True
        self._last = b""
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data):
        now = time.monotonic_ns()
        measured = self._measured
        if self._first:
            self._first = False
            if data.startswith(b"HTTP/1.1 200"):
                measured.streams += 1
            else:
                measured.failed += 1
                print(data[:500].decode("latin-1"))
        if measured.counting:
            measured.delays_ns.extend(now - int(sent) for sent in _SENT.findall(data))
        if b"[DONE]" in data:
            measured.ended += 1
            self._transport.close()

    def connection_lost(self, exc):
        if not self.done.done():
            self.done.set_result(None)

    def pause(self):
        self._transport.pause_reading()

    def close(self):
        self._transport.abort()


def request(path: str, model: str, tokens: int, content: str = "hello") -> bytes:
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "stream": True,
        }
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def connect(address: str, make):
    """Connect to `unix:PATH` or `host:port`."""
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        return (await loop.create_unix_connection(make, address.removeprefix("unix:")))[1]
    host, port = address.rsplit(":", 1)
    return (await loop.create_connection(make, host, int(port)))[1]


async def start(address: str, data: bytes, measured: Measured, streams: int) -> list[Reader]:
    """Open `streams` streams; return when each has begun its answer."""
    readers = []
    for _ in range(streams):
        readers.append(await connect(address, lambda: Reader(data, measured)))
        await asyncio.sleep(0.002)
    async with asyncio.timeout(60):
        while measured.streams + measured.failed < streams:
            await asyncio.sleep(0.05)
    return readers


async def stalled(address: str, *, path: str, model: str, streams: int) -> list[Reader]:
    """Open streams whose engine sends without end, and stop reading each after its first bytes."""
    readers = await start(address, request(path, model, 10**9, "flood"), Measured(), streams)
    for reader in readers:
        reader.pause()
    return readers


async def measure(
    address: str, *, path: str, model: str, streams: int, seconds: float, between=lambda: None
) -> Measured:
    """Read `streams` streams for `seconds`; `between` is called as the measured time begins and ends."""
    measured = Measured()
    data = request(path, model, 10**9)
    readers = await start(address, data, measured, streams)
    await asyncio.sleep(0.5)
    between()
    measured.counting = True
    await asyncio.sleep(seconds)
    measured.counting = False
    between()
    for reader in readers:
        reader.close()
    await asyncio.gather(*(reader.done for reader in readers))
    await asyncio.sleep(0.3)
    return measured
