"""Decisions for the record: into the log at once, into the registry when it is there. Never in a request's way."""

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog
from msgspec import Struct
from sollol.registry import RegistryUnavailable
from sollol.report import Decision

log = structlog.get_logger(__name__)

KEPT_UNWRITTEN = 100  # each has a row per node
RETRY_PAUSE_S = 1.0


class EventLog(Protocol):
    async def record(self, kind: str, payload: Struct) -> None: ...


class History:
    """`decided` never blocks; `run` writes, as soon as the registry is back. Until then only the newest are kept.

    Args:
        written: Whether anybody will `run` this; else nothing is kept.
    """

    def __init__(self, *, written: bool) -> None:
        self._written = written
        self._unwritten: asyncio.Queue[Decision] = asyncio.Queue(KEPT_UNWRITTEN)
        self._listeners: list[Callable[[Decision], None]] = []

    def subscribe(self, listener: Callable[[Decision], None]) -> None:
        """Have `listener` called with every decision; it must not block."""
        self._listeners.append(listener)

    def decided(self, decision: Decision) -> None:
        if decision.refusal is None:
            log.info("placed", model=decision.model, policy=decision.policy, coordinator=decision.coordinator)
        else:
            log.warning("unplaceable", model=decision.model, policy=decision.policy, reason=decision.refusal.reason)
        for listener in self._listeners:
            listener(decision)
        if not self._written:
            return
        if self._unwritten.full():
            self._unwritten.get_nowait()
        self._unwritten.put_nowait(decision)

    async def run(self, registry: EventLog) -> None:
        decision: Decision | None = None
        while True:
            decision = decision or await self._unwritten.get()
            try:
                await registry.record("decision", decision)
            except RegistryUnavailable as error:
                log.debug("decision_not_recorded", model=decision.model, error=str(error))
                await asyncio.sleep(RETRY_PAUSE_S)
            else:
                decision = None
