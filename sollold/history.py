"""Decisions for the record: into the log at once, into the registry when it is there. Never in a request's way."""

import asyncio
from typing import Any, Protocol

import msgspec
import structlog
from sollol.registry import RegistryUnavailable
from sollol.report import Decision

log = structlog.get_logger(__name__)

KEPT_UNWRITTEN = 1000


class EventLog(Protocol):
    async def record(self, kind: str, payload: dict[str, Any]) -> None: ...


class History:
    """`decided` never blocks; `run` writes. While the registry is away only the newest entries are kept."""

    def __init__(self, registry: EventLog | None) -> None:
        self._registry = registry
        self._unwritten: asyncio.Queue[Decision] = asyncio.Queue(KEPT_UNWRITTEN)

    def decided(self, decision: Decision) -> None:
        if decision.refusal is None:
            log.info("placed", model=decision.model, policy=decision.policy, coordinator=decision.coordinator)
        else:
            log.warning("unplaceable", model=decision.model, policy=decision.policy, reason=decision.refusal.reason)
        if self._registry is None:
            return
        if self._unwritten.full():
            self._unwritten.get_nowait()
        self._unwritten.put_nowait(decision)

    async def run(self) -> None:
        while True:
            decision = await self._unwritten.get()
            if self._registry is None:
                continue
            try:
                await self._registry.record("decision", msgspec.to_builtins(decision))
            except RegistryUnavailable as error:
                log.debug("decision_not_recorded", model=decision.model, error=str(error))
