"""The one question that a backend is ever asked: whether it answers, before its coordinator can reach it.

It serves one client at a time, and a question that is given up while it is busy can end it.
"""

import asyncio
import struct

import psutil
from msgspec import Struct

from agent.supervisor.ports import LOOPBACK

_HELLO, _DEVICE_COUNT = 14, 15
_LONGEST_REPLY = 1024


class HandshakeFailedError(Exception):
    """What answered is no backend that we know."""


class Greeting(Struct, frozen=True, kw_only=True):
    protocol: str
    devices: int


def listens(pid: int, port: int) -> bool:
    """Whether this very process listens there. Whoever else may, is not asked anything."""
    try:
        found = psutil.Process(pid).net_connections("tcp4")
    except psutil.Error:  # it is gone
        return False
    return any(each.status == psutil.CONN_LISTEN and tuple(each.laddr) == (LOOPBACK, port) for each in found)


async def greet(port: int, *, within_s: float) -> Greeting:
    """Say hello and ask for the number of devices.

    Raises:
        HandshakeFailedError: It hung up, or said what no backend says.
        TimeoutError: No answer within `within_s` seconds.
    """
    async with asyncio.timeout(within_s):
        try:
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            try:
                major, minor, patch = (await _ask(reader, writer, _HELLO, bytes(24)))[:3]
                (devices,) = struct.unpack("<I", await _ask(reader, writer, _DEVICE_COUNT, b""))
            finally:
                writer.close()
        except (OSError, EOFError, ValueError, struct.error) as error:
            raise HandshakeFailedError(str(error)) from error
    return Greeting(protocol=f"{major}.{minor}.{patch}", devices=devices)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: int, payload: bytes) -> bytes:
    """A request is its number, a size and that many bytes; a reply is a size and that many bytes."""
    writer.write(struct.pack("<BQ", command, len(payload)) + payload)
    (size,) = struct.unpack("<Q", await reader.readexactly(8))
    if size > _LONGEST_REPLY:
        raise ValueError(f"a reply of {size} bytes")
    return await reader.readexactly(size)
