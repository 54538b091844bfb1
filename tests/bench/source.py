"""Plays an engine for the bench: speaks llama-server's HTTP and paces token frames that carry their send time.

One timer paces all streams, so that the source costs little beside what is measured. `--rate` is tokens per second
and stream; llama-server's own flags are accepted and ignored.
"""

import argparse
import asyncio
import heapq
import json
import sys
import time
from itertools import count

TICK_S = 0.001
_PADDING = "x" * 120


def frame(number: int) -> bytes:
    """One SSE frame of about 200 bytes as a chunk; `t` is CLOCK_MONOTONIC in ns, one clock for all processes."""
    body = b'data: {"choices":[{"index":0,"delta":{"content":" token"}}],"n":%d,"t":%d,"p":"%s"}\n\n' % (
        number,
        time.monotonic_ns(),
        _PADDING.encode(),
    )
    return b"%x\r\n%s\r\n" % (len(body), body)


class Source:
    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due: list[tuple[float, int, Stream, int, int]] = []
        self._order = count()

    def add(self, stream: "Stream", tokens: int) -> None:
        # Streams start spread over one period, as real ones do.
        order = next(self._order)
        first = time.monotonic() + (order * 0.618034 % 1.0) / self._rate
        heapq.heappush(self._due, (first, order, stream, 0, tokens))

    async def pace(self) -> None:
        while True:
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                at, order, stream, number, tokens = heapq.heappop(self._due)
                if stream.closed:
                    continue
                if number == tokens:
                    stream.finish()
                    continue
                stream.transport.write(frame(number))
                heapq.heappush(self._due, (at + 1 / self._rate, order, stream, number + 1, tokens))
            next_at = self._due[0][0] if self._due else now + 0.01
            await asyncio.sleep(max(TICK_S, next_at - time.monotonic()))


class Stream(asyncio.Protocol):
    def __init__(self, source: Source) -> None:
        self._source = source
        self._request = b""
        self.closed = False
        self._full = False
        self._flooding = False

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, exc):
        self.closed = True

    def pause_writing(self):
        self._full = True

    def resume_writing(self):
        self._full = False
        if self._flooding:
            self._flood()

    def _flood(self) -> None:
        """As much as the reader takes, for ever: what a reader that stops leaves in flight shows in the daemons."""
        self._flooding = True
        burst = frame(0) * 64
        while not self._full and not self.closed:
            self.transport.write(burst)

    def data_received(self, data):
        self._request += data
        head, end, body = self._request.partition(b"\r\n\r\n")
        length = next(
            (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
        )
        if not end or len(body) < length:
            return
        self._request = b""
        self._answer(head.split(b" ", 2)[1], body)

    def _answer(self, path: bytes, body: bytes) -> None:
        if path in (b"/health", b"/v1/health"):
            self._json({"status": "ok"})
        elif path.endswith(b"/completions") or path == b"/completion":
            self.transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            )
            if b"flood" in body:
                self._flood()
            else:
                self._source.add(self, int(json.loads(body).get("max_tokens", 100)))
        else:
            self._json([])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )

    def finish(self) -> None:
        body = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))


async def serve(path: str, rate: float) -> None:
    source = Source(rate)
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: Stream(source), path, backlog=512)
    print("cmd_child_to_router:state:" + json.dumps({"state": "ready", "payload": {}}), flush=True)
    async with server:
        await source.pace()


def main() -> None:
    if "--version" in sys.argv:
        print("version: 1 (bench)", file=sys.stderr)
        return
    if "--list-devices" in sys.argv:
        print("Available devices:")
        return
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--host", required=True, help="unix socket")
    parser.add_argument("--rate", type=float, default=50.0)
    options, _ = parser.parse_known_args()
    asyncio.run(serve(options.host, options.rate))


if __name__ == "__main__":
    main()
