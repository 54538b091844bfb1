"""What forwarders and tunnels could have been: `python -P -m tests.bench.pumps KIND END LISTEN TARGET TLS_DIR`.

KIND is `asyncio` or `threads`; END `near` (plain in, TLS out) or `far` (TLS in, plain out). For comparison only: no
admission, no counting. `threads` blocks in one thread per direction, so that only one direction may be used: an OpenSSL
connection must not be read and written at the same time.
"""

import asyncio
import contextlib
import socket
import sys
import threading
from pathlib import Path

from sollol.tls import TlsFiles

_BUFFER_BYTES = 256 * 1024


class Side(asyncio.Protocol):
    def __init__(self, other: "Side | None" = None) -> None:
        self.other = other

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.set_write_buffer_limits(high=2 * _BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        self.other.transport.write(data)

    def pause_writing(self) -> None:
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None:
            self.other.transport.close()


async def with_asyncio(end: str, listen: int, target: int, files: TlsFiles) -> None:
    loop = asyncio.get_running_loop()
    opening = set()

    class Came(Side):
        def connection_made(self, transport) -> None:
            super().connection_made(transport)
            transport.pause_reading()
            task = asyncio.create_task(self._open())
            opening.add(task)
            task.add_done_callback(opening.discard)

        async def _open(self) -> None:
            tls = {"ssl": _client(files), "server_hostname": "x"} if end == "near" else {}
            _, self.other = await loop.create_connection(lambda: Side(self), "127.0.0.1", target, **tls)
            self.transport.resume_reading()

    context = files.server_context() if end == "far" else None
    await loop.create_server(Came, "127.0.0.1", listen, ssl=context)
    print("listens", flush=True)
    await asyncio.Event().wait()


def with_threads(end: str, listen: int, target: int, files: TlsFiles) -> None:
    with socket.create_server(("127.0.0.1", listen)) as listener:
        print("listens", flush=True)
        while True:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", target))
            if end == "far":
                near = files.server_context().wrap_socket(near, server_side=True)
            else:
                far = _client(files).wrap_socket(far)
            threading.Thread(target=_copy, args=(near, far), daemon=True).start()


def _copy(source: socket.socket, to: socket.socket) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with source, to, contextlib.suppress(OSError):  # one way only: the sink's answer has no way back
        while size := source.recv_into(buffer):
            to.sendall(buffer[:size])


def _client(files: TlsFiles):
    context = files.client_context()
    context.check_hostname = False
    return context


def main() -> None:
    kind, end, listen, target, directory = sys.argv[1:]
    files = TlsFiles(Path(directory))
    if kind == "asyncio":
        asyncio.run(with_asyncio(end, int(listen), int(target), files))
    with_threads(end, int(listen), int(target), files)


if __name__ == "__main__":
    main()
