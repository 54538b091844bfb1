"""Owner of what this node knows of its links to other nodes: measured when a head asks, one at a time, and reported.

Kept in memory only: a link is measured again in a second, and the other node's report tells of it too.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import structlog
from msgspec import Struct
from msgspec.structs import replace
from sollol.errors import Reason, SollolError
from sollol.link import Link

log = structlog.get_logger(__name__)

JUST_NOW_S = 30.0  # several heads may ask for the same link: the second gets what the first one got
MOST_LINKS = 64


class Answer(Protocol):
    """Whoever answered at an address, and how it was reached."""

    @property
    def node_id(self) -> str: ...
    @property
    def boot_id(self) -> str: ...
    @property
    def rtt_s(self) -> float: ...
    @property
    def bytes_per_s(self) -> float: ...


class _Known(Struct, frozen=True):
    link: Link
    address: tuple[str, int]
    measured_s: float


class Links:
    """`measure` adds a link, `all` are those for the report.

    Args:
        probe: Measures the way to an agent; raises SollolError, AGENT_UNREACHABLE when no byte comes through.
    """

    def __init__(
        self,
        *,
        probe: Callable[[str, int], Awaitable[Answer]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe, self._clock = probe, clock
        self._known: dict[str, _Known] = {}  # the oldest first
        self._turn = asyncio.Lock()

    def all(self) -> tuple[Link, ...]:
        return tuple(self._aged(known) for known in self._known.values())

    async def measure(self, node_id: str, host: str, port: int) -> Link:
        """The link to the node whose agent is at this address, out of reach or not.

        Raises:
            SollolError: the agent there can be reached and refuses, or is of a version that cannot be measured.
        """
        async with self._turn:
            known = self._known.get(node_id)
            if known and known.address == (host, port) and self._clock() - known.measured_s < JUST_NOW_S:
                return self._aged(known)
            link, problem = await self._measured(node_id, host, port)
        if problem and not (known and known.link.unreachable):
            log.warning("peer_unreachable", peer=node_id, host=host, port=port, problem=problem)
        elif known and known.link.unreachable and not problem:
            log.info("peer_reachable", peer=node_id, host=host, port=port)
        self._known.pop(node_id, None)
        self._known[node_id] = _Known(link, (host, port), self._clock())
        while len(self._known) > MOST_LINKS:
            del self._known[next(iter(self._known))]
        return link

    async def _measured(self, node_id: str, host: str, port: int) -> tuple[Link, str]:
        try:
            answer = await self._probe(host, port)
        except SollolError as error:
            if error.refusal.reason is not Reason.AGENT_UNREACHABLE:
                raise
            return Link(node_id=node_id, unreachable=True), error.refusal.message
        if answer.node_id != node_id:
            return Link(node_id=node_id, unreachable=True), f"node {answer.node_id} answers there"
        return Link(
            node_id=node_id, rtt_s=answer.rtt_s, bytes_per_s=answer.bytes_per_s, boot_id=answer.boot_id
        ), ""  # fmt: skip

    def _aged(self, known: _Known) -> Link:
        return replace(known.link, age_s=self._clock() - known.measured_s)
