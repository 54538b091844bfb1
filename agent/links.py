"""Owner of what this node knows of its links to other nodes: measured when a head asks, one at a time, and reported.

A node that does not answer is tried again by ourselves: heads keep the two apart, and shall hear soon when it is over.
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
RETRY_S = 5.0
# A peer that restarts or hangs for a moment is no broken link; after this time heads have noticed by themselves.
LASTS_S = 10.0
FORGOTTEN_AFTER_S = 3600.0  # the node may have left for good; a head asks again where it has not


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


class _Known(Struct, frozen=True, kw_only=True):
    link: Link
    measured_s: float


class _Failing(Struct, frozen=True, kw_only=True):
    """A peer that could not be reached, from `since_s` to `last_s` at least."""

    host: str
    port: int
    since_s: float
    last_s: float
    problem: str

    @property
    def lasts(self) -> bool:
        return self.last_s - self.since_s >= LASTS_S


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Links:
    """`measure` adds a link, `all` are those for the report, `run` tries again what failed.

    Args:
        probe: Measures the way to an agent; raises SollolError, AGENT_UNREACHABLE when no byte comes through.
        who: The node id of the agent at an address; raises the same.
    """

    def __init__(
        self,
        *,
        probe: Callable[[str, int], Awaitable[Answer]],
        who: Callable[[str, int], Awaitable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._probe, self._who, self._clock = probe, who, clock
        self._known: dict[str, _Known] = {}  # the oldest first
        self._failing: dict[str, _Failing] = {}
        self._turn = asyncio.Lock()
        self._changed: Callable[[], None] = lambda: None

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called when `run` has found something new to report."""
        self._changed = listener

    def all(self) -> tuple[Link, ...]:
        now_s = self._clock()
        out_of_reach = {node_id: failing for node_id, failing in self._failing.items() if failing.lasts}
        reached = (known for node_id, known in self._known.items() if node_id not in out_of_reach)
        return (
            *(replace(known.link, age_s=now_s - known.measured_s) for known in reached),
            *(_unreachable(node_id, failing, now_s) for node_id, failing in out_of_reach.items()),
        )

    async def measure(self, node_id: str, host: str, port: int) -> Link:
        """The link to the node whose agent is at this address; unreachable when it could not be measured now.

        Raises:
            SollolError: the agent there can be reached and refuses, or is of a version that cannot be measured.
        """
        async with self._turn:
            found = self._just_found(node_id, address_of(host, port))
            if found is not None:
                return found
            try:
                answer = await self._probe(host, port)
            except SollolError as error:
                return self._failed(node_id, host, port, _problem(error))
            if answer.node_id != node_id:
                return self._failed(node_id, host, port, _other(answer.node_id))
            return self._measured(answer, address_of(host, port))

    async def run(self) -> None:
        """Try peers that are out of reach again and again, until cancelled."""
        while True:
            await asyncio.sleep(RETRY_S)
            await asyncio.gather(*(self._retry(node_id, failing) for node_id, failing in self._failing.items()))

    def _just_found(self, node_id: str, address: str) -> Link | None:
        known, failing, now_s = self._known.get(node_id), self._failing.get(node_id), self._clock()
        if failing is not None:
            return _unreachable(node_id, failing, now_s) if address_of(failing.host, failing.port) == address else None
        if known is not None and known.link.address == address and now_s - known.measured_s < JUST_NOW_S:
            return replace(known.link, age_s=now_s - known.measured_s)
        return None

    def _measured(self, answer: Answer, address: str) -> Link:
        link = Link(
            node_id=answer.node_id,
            rtt_s=answer.rtt_s,
            bytes_per_s=answer.bytes_per_s,
            boot_id=answer.boot_id,
            address=address,
        )
        self._failing.pop(link.node_id, None)
        self._known.pop(link.node_id, None)
        self._known[link.node_id] = _Known(link=link, measured_s=self._clock())
        _bound(self._known)
        return link

    def _failed(self, node_id: str, host: str, port: int, problem: str) -> Link:
        now_s = self._clock()
        failing = _Failing(host=host, port=port, since_s=now_s, last_s=now_s, problem=problem)
        self._failing[node_id] = failing
        _bound(self._failing)
        return _unreachable(node_id, failing, now_s)

    async def _retry(self, node_id: str, before: _Failing) -> None:
        try:
            found = await self._who(before.host, before.port)
            problem = "" if found == node_id else _other(found)
        except SollolError as error:
            problem = error.refusal.message
        if self._failing.get(node_id) is not before:
            return  # a head had it measured meanwhile, at another address
        after = replace(before, last_s=self._clock(), problem=problem)
        if not problem or after.last_s - after.since_s > FORGOTTEN_AFTER_S:
            del self._failing[node_id]
        else:
            self._failing[node_id] = after
        if before.lasts and node_id not in self._failing:
            log.info("peer_forgotten" if problem else "peer_reachable", peer=node_id, host=before.host)
            self._changed()
        elif after.lasts and not before.lasts:
            log.warning("peer_unreachable", peer=node_id, host=before.host, port=before.port, problem=problem)
            self._changed()


def _problem(error: SollolError) -> str:
    """Raises the error again when it is another one."""
    if error.refusal.reason is not Reason.AGENT_UNREACHABLE:
        raise error
    return error.refusal.message


def _other(node_id: str) -> str:
    return f"node {node_id} answers there"


def _unreachable(node_id: str, failing: _Failing, now_s: float) -> Link:
    address = address_of(failing.host, failing.port)
    return Link(node_id=node_id, unreachable=True, age_s=now_s - failing.last_s, address=address)


def _bound(links: dict[str, _Known] | dict[str, _Failing]) -> None:
    while len(links) > MOST_LINKS:
        del links[next(iter(links))]
