"""Where agents were: what a new head needs to find every pool again when the registry is empty or gone."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog
from msgspec import Struct
from sollol import kept
from sollol.report import NodeStatus

log = structlog.get_logger(__name__)

FILE_NAME = "agents.json"
VERSION = 1
MOST = 4096
_AGAIN_AFTER_S = 3600.0  # an agent that is there all the time is written down no more often
_LONGEST_S = 7 * 24 * 3600.0


class _Agent(Struct, frozen=True):
    address: str
    heard_unix_s: float


class Link(Protocol):
    @property
    def address(self) -> str: ...


class Watched(Protocol):
    def status(self, node_id: str) -> NodeStatus | None: ...
    def link(self, node_id: str) -> Link: ...


class Remembered:
    """Owner of the file. `run()` writes; nothing here ever keeps a head from serving.

    Args:
        path: What cannot be understood there is set aside.
    """

    def __init__(self, path: Path, *, wall_clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, wall_clock
        found = kept.load(path, dict[str, _Agent], version=VERSION) or {}
        young = {name: each for name, each in found.items() if each.heard_unix_s > wall_clock() - _LONGEST_S}
        self._agents = dict(list(young.items())[-MOST:])
        self._news = asyncio.Event()

    def addresses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(each.address for each in self._agents.values()))

    def heard(self, nodes: Watched, node_id: str) -> None:
        """It reported, was lost or is forgotten. Nearly all reports say nothing new here."""
        status = nodes.status(node_id)
        if status is None or not status.connected:
            return
        address, now = nodes.link(node_id).address, self._clock()
        known = self._agents.get(node_id)
        if known is None or known.address != address or now - known.heard_unix_s > _AGAIN_AFTER_S:
            self._agents.pop(node_id, None)  # the longest unheard of are the first
            self._agents[node_id] = _Agent(address, now)
            if len(self._agents) > MOST:
                del self._agents[next(iter(self._agents))]
            self._news.set()

    async def run(self) -> None:
        """Write down what is new, until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            agents = dict(self._agents)
            try:
                await asyncio.to_thread(self._save, agents)
            except OSError as error:  # the registry may still know
                log.warning("agents_not_remembered", path=str(self._path), problem=str(error))

    def _save(self, agents: dict[str, _Agent]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.save(self._path, agents, version=VERSION)
