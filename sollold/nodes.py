"""Every node the head knows, with its newest report.

Two sources, so that losing one hides no node: the registry says where agents are, and a direct watch of each agent
says how it is. A report from the watch is newer than the registry's copy of it, and stays when the registry is gone.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog
from msgspec.structs import replace
from sollol.errors import Reason, SollolError, refuse
from sollol.registry import RegistryUnavailable
from sollol.report import Model, ModelShape, NodeStatus, Report

from sollold.agent_link import AgentLink

log = structlog.get_logger(__name__)

REGISTRY_POLL_S = 1.0
RECONNECT_MIN_S = 0.2
RECONNECT_MAX_S = 2.0


class ReportSource(Protocol):
    async def reports(self) -> tuple[Report, ...]: ...


@dataclass
class _Node:
    report: Report
    received_s: float
    link: AgentLink
    connected: bool


class Nodes:
    """Owner of the head's view of the cluster. `run()` keeps it fresh; everyone else reads.

    Args:
        static_addresses: Agents to watch whatever the registry says.
        on_change: Called after every report and every lost connection.
    """

    def __init__(
        self,
        registry: ReportSource | None,
        *,
        static_addresses: Iterable[str],
        forget_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._static = tuple(static_addresses)
        self._forget_after_s = forget_after_s
        self._clock = clock
        self._nodes: dict[str, _Node] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._listeners: list[Callable[[], None]] = []
        self._registry_up = True
        self._shapes: dict[ModelShape, ModelShape] = {}

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after every change of the view."""
        self._listeners.append(listener)

    def statuses(self) -> tuple[NodeStatus, ...]:
        """Every known node, ordered by node id."""
        now = self._clock()
        return tuple(
            NodeStatus(report=node.report, report_age_s=now - node.received_s, connected=node.connected)
            for _, node in sorted(self._nodes.items())
        )

    def link(self, node_id: str) -> AgentLink:
        """Raises AGENT_UNREACHABLE when the node is not known any more."""
        node = self._nodes.get(node_id)
        if node is None:
            raise refuse(Reason.AGENT_UNREACHABLE, f"node {node_id} is not known to this head", retryable=True)
        return node.link

    async def run(self) -> None:
        """Follow registry and agents until cancelled; closes every channel on the way out."""
        try:
            while True:
                addresses = await self._addresses()
                self._watch_all(addresses)
                if self._registry_up:
                    self._unwatch_withdrawn(addresses)
                self._forget_silent()
                await asyncio.sleep(REGISTRY_POLL_S)
        finally:
            for task in self._watches.values():
                task.cancel()
            await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def _addresses(self) -> set[str]:
        found = set(self._static)
        if self._registry is None:
            return found
        try:
            found.update(report.address for report in await self._registry.reports())
        except RegistryUnavailable as error:
            if self._registry_up:
                log.warning("registry_lost", error=str(error), known_nodes=len(self._nodes))
            self._registry_up = False
        else:
            if not self._registry_up:
                log.info("registry_regained")
            self._registry_up = True
        return found

    def _watch_all(self, addresses: set[str]) -> None:
        for address in addresses:
            task = self._watches.get(address)
            if task is None or task.done():
                self._watches[address] = asyncio.create_task(self._watch(address), name=f"watch {address}")

    def _unwatch_withdrawn(self, addresses: set[str]) -> None:
        """Stop dialling addresses that the registry dropped and no known node has."""
        known = {node.link.address for node in self._nodes.values()}
        for address in set(self._watches) - addresses - known:
            self._watches.pop(address).cancel()

    def _forget_silent(self) -> None:
        limit = self._clock() - self._forget_after_s
        gone = [node_id for node_id, node in self._nodes.items() if not node.connected and node.received_s < limit]
        for node_id in gone:
            node = self._nodes.pop(node_id)
            log.warning("node_forgotten", node=node_id, address=node.link.address)
            if node.link.address not in self._static:
                task = self._watches.pop(node.link.address, None)
                if task is not None:
                    task.cancel()
        if gone:
            self._changed()

    async def _watch(self, address: str) -> None:
        """Keep one agent watched; the channel outlives reconnects and is closed with the task."""
        link = AgentLink(address)
        pause_s = RECONNECT_MIN_S
        try:
            while True:
                try:
                    async with contextlib.aclosing(link.watch_report()) as reports:
                        async for report in reports:
                            self._received(report, link)
                            pause_s = RECONNECT_MIN_S
                except SollolError as error:
                    log.debug("agent_watch_ended", address=address, error=str(error))
                self._lost(link)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_MAX_S)
        finally:
            await link.close()

    def _received(self, report: Report, link: AgentLink) -> None:
        known = self._nodes.get(report.node_id)
        if known is not None and known.link is not link and known.connected:
            log.error("node_id_in_use", node=report.node_id, first=known.link.address, second=link.address)
            return
        if known is None or not known.connected:
            log.info("node_connected", node=report.node_id, address=link.address)
        if known is None or known.report.models is not report.models:
            report = replace(report, models=tuple(self._with_shared_shape(model) for model in report.models))
        self._nodes[report.node_id] = _Node(report=report, received_s=self._clock(), link=link, connected=True)
        self._changed()

    def _with_shared_shape(self, model: Model) -> Model:
        """Nodes with the same file share one shape object: placement works once per object, not once per node."""
        if model.shape is None:
            return model
        return replace(model, shape=self._shapes.setdefault(model.shape, model.shape))

    def _lost(self, link: AgentLink) -> None:
        for node_id, node in self._nodes.items():
            if node.link is link and node.connected:
                node.connected = False
                log.warning("node_disconnected", node=node_id, address=link.address)
                self._changed()

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()
