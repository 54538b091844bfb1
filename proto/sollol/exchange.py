"""Hands the list of revoked certificates from daemon to daemon: whoever has the newer one gives it to the other.

A gRPC edge. Both sides of a call run the same: they say their number first, and send the list itself to one whose
number is lower. So it goes from one head to its agents, from these to other heads, and no further than it is news.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from sollol.errors import SollolError
from sollol.tls import TlsFiles

log = structlog.get_logger(__name__)


async def exchange(
    tls: TlsFiles, read: Callable[[], Awaitable[Any]], write: Callable[[Any], Awaitable[None]], kind: Any, *, peer: str
) -> None:
    """Tell the peer of our list now and whenever there is a newer one, and take theirs, until the call ends.

    `read` returns the peer's next message, or something without a number at the end; `write` sends one of our `kind`.
    """
    side = _Side(tls, peer)
    forget = tls.subscribe(side.news.set)
    telling = asyncio.create_task(side.tell(write, kind), name=f"tell {peer} who is revoked")
    try:
        while hasattr(message := await read(), "number"):
            await side.hear(message.number, message.revoked)
    finally:
        forget()
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


class _Side:
    """What the peer is known to have: -1 before it has said so."""

    def __init__(self, tls: TlsFiles, peer: str) -> None:
        self.news = asyncio.Event()
        self._tls, self._peer = tls, peer
        self._theirs = self._told = -1

    async def tell(self, write: Callable[[Any], Awaitable[None]], kind: Any) -> None:
        while True:
            self.news.clear()
            mine = self._tls.current().revoked
            if 0 <= self._theirs < mine.number:
                self._theirs = self._told = mine.number
                await write(kind(number=mine.number, revoked=mine.pem))
            elif self._told != mine.number:
                self._told = mine.number
                await write(kind(number=mine.number))
            await self.news.wait()

    async def hear(self, number: int, revoked: bytes) -> None:
        self._theirs = number
        if revoked:
            try:
                await asyncio.to_thread(self._tls.take_revoked, revoked, peer=self._peer)
            except SollolError as error:
                refusal = error.refusal
                log.warning("revoked_list_refused", peer=self._peer, reason=refusal.reason, message=refusal.message)
            else:
                self._tls.look()
        self.news.set()
