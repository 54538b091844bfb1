"""One user's open response of server-sent events."""

import asyncio
from collections.abc import Mapping

from aiohttp import web

# A reader that takes nothing for this long is given up: what it holds back, others could use.
WRITE_STALL_S = 120
# Below this much unsent data a write cannot block: aiohttp drains from 64 KiB on.
_NEVER_BLOCKS_BYTES = 32_768

_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """The user's connection is closed, or its reader stalled."""


class EventResponse:
    """Sends events to one user. Headers go out with `start`, once; afterwards errors can only be events."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)

    @property
    def started(self) -> bool:
        return self.response.prepared

    async def start(self, headers: Mapping[str, str] | None = None) -> None:
        """Send the headers unless they are sent already; `headers` come too late then, and are dropped."""
        if self.started:
            return
        self.response.headers.update(headers or {})
        try:
            await self.response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGoneError from error

    async def send(self, data: bytes) -> None:
        """Write; waits while the user reads slower than we write.

        Raises:
            ClientGoneError: the connection is closed, or nothing was taken for WRITE_STALL_S seconds.
        """
        transport = self._request.transport
        if transport is None:
            raise ClientGoneError
        try:
            if len(data) + transport.get_write_buffer_size() < _NEVER_BLOCKS_BYTES:
                await self.response.write(data)
                return
            async with asyncio.timeout(WRITE_STALL_S):
                await self.response.write(data)
        except (ConnectionError, TimeoutError) as error:
            transport.abort()
            raise ClientGoneError from error

    async def finish(self) -> web.StreamResponse:
        """End the response, once everything has left for the user.

        Raises:
            ClientGoneError: as `send`; a reader may stall with an answer that is all written as well.
        """
        transport = self._request.transport
        try:
            async with asyncio.timeout(WRITE_STALL_S):
                await self.response.write_eof()
        except (ConnectionError, TimeoutError) as error:
            if transport is not None:
                transport.abort()
            raise ClientGoneError from error
        return self.response
