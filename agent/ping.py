"""How long a byte takes to another agent and back, without either side's Python in it.

An HTTP/2 PING frame is answered by the C core of the other agent's gRPC server at once, whatever its Python does just
then. Timing TCP's own handshake would be simpler still, but a proxy or tunnel in between answers that itself.
"""

import asyncio
import time

from sollol.errors import SollolError
from sollol.identity import Role, role_name
from sollol.tls import TlsFiles

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PINGS = 10
WITHIN_S = 2.0
ENOUGH_S = 0.5  # on a slow link fewer pings say enough
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK = 1
_HEADER_BYTES = 9
_MAX_FRAME_BYTES = 1 << 14  # what HTTP/2 allows before anything else is agreed


async def round_trip_s(host: str, port: int, tls: TlsFiles | None = None) -> float:
    """The shortest of a few round trips to the gRPC server there, an agent's when we have a certificate.

    Raises:
        SollolError: whoever listens there has a certificate that does not count, as one that is revoked.
        OSError: nobody listens, the connection breaks, or what listens there speaks no HTTP/2.
        TimeoutError: it accepts and does not answer, or drops everything.
    """
    async with asyncio.timeout(WITHIN_S):
        reader, writer = await _connected(host, port, tls)
        try:
            writer.write(PREFACE + _frame(_SETTINGS))
            return await _shortest(reader, writer)
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError(f"{host}:{port} closed the connection before it answered a ping") from error
        finally:
            writer.transport.abort()  # nothing is left to be sent, and nobody waits for a peer that hangs


async def _connected(host: str, port: int, tls: TlsFiles | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if tls is None:
        return await asyncio.open_connection(host, port)
    context = tls.client_context(http2=True)
    reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=role_name(Role.AGENT))
    try:
        tls.peer(writer.get_extra_info("ssl_object"))
    except SollolError:
        writer.transport.abort()
        raise
    return reader, writer


async def _shortest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    begun_s = time.perf_counter()
    shortest_s = WITHIN_S
    for number in range(PINGS):
        sent_s = time.perf_counter()
        await _ping(reader, writer, number.to_bytes(8, "big"))
        now_s = time.perf_counter()
        shortest_s = min(shortest_s, now_s - sent_s)
        if now_s - begun_s > ENOUGH_S:
            break
    return shortest_s


async def _ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(_frame(_PING, payload=payload))
    while True:
        header = await reader.readexactly(_HEADER_BYTES)
        size, kind, flags = int.from_bytes(header[:3], "big"), header[3], header[4]
        if size > _MAX_FRAME_BYTES:
            raise ConnectionResetError("what answers there speaks no HTTP/2")
        body = await reader.readexactly(size)
        if kind == _PING and flags & _ACK and body == payload:
            return
        if kind == _SETTINGS and not flags & _ACK:
            writer.write(_frame(_SETTINGS, _ACK))
        elif kind == _GOAWAY:
            raise ConnectionResetError(f"sent away: {body[8:].decode(errors='replace')}")


def _frame(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """On stream 0, which is the connection's own."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + bytes(4) + payload
