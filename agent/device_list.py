"""Asks the engine for its list of devices again, while it alone knows what is free on one of them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Protocol

import structlog
from sollol.report import Instance, InstanceState

from agent.engine_devices import EngineDevice

log = structlog.get_logger(__name__)

EVERY_S = 60.0
_FREES = frozenset({InstanceState.STOPPED, InstanceState.FAILED, InstanceState.BACKOFF})

Listing = Callable[[], Awaitable[Sequence[EngineDevice] | None]]


class Listener(Protocol):
    """The part of the probe that the list goes to."""

    @property
    def engine_alone(self) -> bool:
        """Whether there is a device whose memory no driver tells of."""
        ...

    def heard_engine(self, devices: Sequence[EngineDevice]) -> None: ...

    def engine_outdated(self) -> None:
        """Less is free than the last list says, nobody knows how much."""
        ...


class DeviceList:
    """Asks after `every_s` seconds, and when an instance has taken or freed memory.

    Args:
        ask: The engine's list as it is now; None when it does not answer.
        on_change: Told after each new list.
    """

    def __init__(
        self, ask: Listing, listener: Listener, on_change: Callable[[], None], *, every_s: float = EVERY_S
    ) -> None:
        self._ask = ask
        self._listener = listener
        self._on_change = on_change
        self._every_s = every_s
        self._due = asyncio.Event()
        self._silent = False
        self._ready: set[str] = set()

    def instance_changed(self, instance: Instance) -> None:
        """From READY on the ledger takes an instance's bytes for measured: a list from before must not count."""
        became_ready = instance.state is InstanceState.READY and instance.instance_id not in self._ready
        if became_ready:
            self._ready.add(instance.instance_id)
            self._listener.engine_outdated()
        elif instance.state is not InstanceState.READY:
            self._ready.discard(instance.instance_id)
        if became_ready or instance.state in _FREES:
            self._due.set()

    async def run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._due.wait()
            self._due.clear()
            if self._listener.engine_alone:
                await self._refresh()

    async def _refresh(self) -> None:
        devices = await self._ask()
        if devices is None and not self._silent:  # a load makes the machine busy, and an engine overdue
            devices = await self._ask()
        if self._due.is_set():
            return  # something has changed meanwhile: the list may be from before, and is asked for again
        if devices is None:
            if not self._silent:
                hint = "what is free on its GPUs is as old as its last list, and nothing where that is outdated"
                log.warning("engine_lists_no_devices", hint=hint)
        else:
            self._listener.heard_engine(devices)
            self._on_change()
        self._silent = devices is None
