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
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.registry import RegistryUnavailable
from sollol.report import InstanceKind, Model, ModelShape, NodeStatus, Report
from sollol.tls import TlsFiles

from sollold.agent_link import AgentLink
from sollold.away import is_away

log = structlog.get_logger(__name__)

REGISTRY_POLL_S = 1.0
HEARD_WITHIN_S = 5.0
RECONNECT_MIN_S = 0.2
RECONNECT_MAX_S = 2.0
SHAPES_KEPT = 4096


class AddressSource(Protocol):
    async def addresses(self) -> tuple[str, ...]: ...


@dataclass
class _Node:
    report: Report
    sent_models: tuple[Model, ...]
    received_s: float
    link: AgentLink
    connected: bool = True
    away: bool = False
    restarting: bool = False


class Nodes:
    """Owner of the head's view of the cluster. `run()` keeps it fresh; everyone else reads.

    Args:
        static_addresses: Agents to watch whatever the registry says.
        remembered: Agents to try at first, whatever the registry says: they were there before this head was.
        forget_after_s: A lost node that stays silent for longer is not listed any more.
        tls: This head's certificate; agents must then have theirs.
    """

    def __init__(
        self,
        registry: AddressSource | None,
        *,
        static_addresses: Iterable[str],
        forget_after_s: float,
        remembered: Iterable[str] = (),
        tls: TlsFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._static = tuple(static_addresses)
        self._forget_after_s = forget_after_s
        self._remembered, self._remembered_until_s = tuple(remembered), clock() + forget_after_s
        self._tls = tls
        self._clock = clock
        self._began_s = clock()
        self._listed: tuple[str, ...] | None = (
            None if registry is not None else ()
        )  # None: the registry has not answered
        self._nodes: dict[str, _Node] = {}  # ordered by node id
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[str], None]] = []
        self._registry_up = True
        self._shapes: dict[ModelShape, ModelShape] = {}
        self._complained: set[tuple[str, str]] = set()
        self.models_version = 0
        """Changes whenever a node comes or goes, or has other models than before."""

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called with a node's id when it reported, was lost or is forgotten."""
        self._listeners.append(listener)

    def statuses(self) -> tuple[NodeStatus, ...]:
        """Every known node, ordered by node id. Costs as much as there are nodes: not for every request."""
        now = self._clock()
        return tuple(self._status(node, now) for node in self._nodes.values())

    def status(self, node_id: str) -> NodeStatus | None:
        node = self._nodes.get(node_id)
        return self._status(node, self._clock()) if node is not None else None

    @staticmethod
    def _status(node: _Node, now: float) -> NodeStatus:
        age_s = now - node.received_s
        return NodeStatus(report=node.report, report_age_s=age_s, connected=node.connected, restarting=node.restarting)

    def summary(self) -> str:
        """Who is there and what runs, in a few words."""
        running = [instance for node in self._nodes.values() for instance in node.report.instances]
        pools = [instance for instance in running if instance.kind is InstanceKind.COORDINATOR]
        streams = sum(pool.active_streams for pool in pools)
        return f"{len(self._nodes)} nodes, {len(pools)} pools, {streams} streams"

    def any_live(self, stale_after_s: float) -> bool:
        """Some node is connected, or was until a moment ago."""
        limit = self._clock() - stale_after_s
        return any(node.connected or node.received_s >= limit for node in self._nodes.values())

    def all_heard(self) -> bool:
        """Whether every agent that is dialled has reported, or would have done so since the start."""
        if self._clock() - self._began_s >= HEARD_WITHIN_S:
            return True
        return self._listed is not None and self._watches.keys() <= {node.link.address for node in self._nodes.values()}

    def link(self, node_id: str) -> AgentLink:
        """Raises AGENT_UNREACHABLE when the node is not known any more."""
        node = self._nodes.get(node_id)
        if node is None:
            raise refuse(Reason.AGENT_UNREACHABLE, f"node {node_id} is not known to this head", retryable=True)
        return node.link

    def watch_also(self, addresses: Iterable[str]) -> None:
        """From the next look on, instead of the former `static_addresses`."""
        self._static = tuple(addresses)

    async def run(self) -> None:
        """Follow registry and agents until cancelled; closes every channel on the way out."""
        try:
            async with asyncio.TaskGroup() as following:
                if self._registry is not None:  # beside the rest, which waits for no registry
                    following.create_task(self._follow(self._registry), name="follow the registry")
                while True:
                    self._watch_wanted()
                    self._forget_silent()
                    self._tell_lost()
                    await asyncio.sleep(REGISTRY_POLL_S)
        finally:
            for task in self._watches.values():
                task.cancel()
            await asyncio.gather(*self._watches.values(), *self._ending, return_exceptions=True)

    async def _follow(self, registry: AddressSource) -> None:
        while True:
            try:
                self._listed = await registry.addresses()
            except RegistryUnavailable as error:
                if self._registry_up:
                    log.warning("registry_lost", error=str(error), known_nodes=len(self._nodes))
                self._registry_up = False
            else:
                if not self._registry_up:
                    log.info("registry_regained")
                self._registry_up = True
                self._watch_wanted()
            await asyncio.sleep(REGISTRY_POLL_S)

    def _watch_wanted(self) -> None:
        """Dial every wanted address, and those no more that nobody wants and no known node has."""
        wanted = {*self._static, *(self._listed or ())}
        if self._clock() < self._remembered_until_s:
            wanted.update(self._remembered)
        for address in wanted - set(self._watches):
            self._watches[address] = asyncio.create_task(self._watch(address), name=f"watch {address}")
        if not self._registry_up:
            return
        known = {node.link.address for node in self._nodes.values()}
        for address in set(self._watches) - wanted - known:
            task = self._watches.pop(address)
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
            task.cancel()

    def _tell_lost(self) -> None:
        """Those that were away for a moment, and were not back in time."""
        now = self._clock()
        for node_id, node in tuple(self._nodes.items()):
            if node.away and not is_away(self._status(node, now)):
                node.away = False
                self._changed(node_id)

    def _forget_silent(self) -> None:
        limit = self._clock() - self._forget_after_s
        gone = [node_id for node_id, node in self._nodes.items() if not node.connected and node.received_s < limit]
        for node_id in gone:
            node = self._nodes.pop(node_id)
            self.models_version += 1
            log.warning("node_forgotten", node=node_id, address=node.link.address)
            self._changed(node_id)

    async def _watch(self, address: str) -> None:
        """Keep one agent watched; the channel outlives reconnects and is closed with the task."""
        link = AgentLink(address, self._tls)
        pause_s = RECONNECT_MIN_S
        told = ""
        try:
            while True:
                problem, reason = "it ended the watch", "ENDED"
                try:
                    async with contextlib.aclosing(link.watch_report()) as reports:
                        async for report in reports:
                            refusal = self._received(report, link)
                            if refusal is not None:
                                await _tell(link, refusal)
                            pause_s, told = RECONNECT_MIN_S, ""
                except SollolError as error:
                    problem, reason = error.refusal.message, error.refusal.reason
                except Exception as error:  # a bug must not leave a node that looks connected and is not watched
                    log.exception("agent_watch_failed", address=address)
                    problem, reason = repr(error), Reason.INTERNAL
                if reason != told:
                    log.warning("agent_not_watched", address=address, reason=reason, problem=problem)
                told = reason
                self._lost(link, restarting=reason is Reason.AGENT_RESTARTING)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RECONNECT_MAX_S)
        finally:
            await link.close()

    def _received(self, report: Report, link: AgentLink) -> Refusal | None:
        """Take a report in; returns what to tell an agent that is not taken in and does not know yet."""
        node_id = report.node_id
        known = self._nodes.get(node_id)
        if known is not None and known.link is not link and known.connected:
            return self._twin(known, report, link)
        if known is None or not known.connected:
            log.info("node_connected", node=node_id, address=link.address)
            self._complained = {pair for pair in self._complained if pair[0] != node_id}
        sent = report.models
        if known is not None and (known.sent_models is sent or known.sent_models == sent):
            models = known.report.models
        else:
            models = tuple(self._with_shared_shape(model) for model in sent)
            self.models_version += 1
        self._nodes[node_id] = _Node(
            report=replace(report, models=models), sent_models=sent, received_s=self._clock(), link=link
        )
        if known is None:
            self._nodes = dict(sorted(self._nodes.items()))
        self._changed(node_id)
        return None

    def _twin(self, known: _Node, report: Report, link: AgentLink) -> Refusal | None:
        """Keep the first; silently when it is the same agent under another name, such as `localhost`."""
        first, second = known.link.address, link.address
        if _agent_of(known.report) == _agent_of(report) or (report.node_id, second) in self._complained:
            return None
        self._complained.add((report.node_id, second))
        log.error("node_id_in_use", node=report.node_id, first=first, second=second)
        message = f"the agent at {first} is node {report.node_id} already: give the one at {second} another node_id"
        return Refusal(reason=Reason.NODE_ID_IN_USE, message=message)

    def _with_shared_shape(self, model: Model) -> Model:
        """Nodes with the same file share one shape object: placement works once per object, not once per node."""
        if model.shape is None:
            return model
        if len(self._shapes) >= SHAPES_KEPT:
            self._shapes.clear()  # shared from here on again
        return replace(model, shape=self._shapes.setdefault(model.shape, model.shape))

    def _lost(self, link: AgentLink, *, restarting: bool) -> None:
        for node_id, node in tuple(self._nodes.items()):
            if node.link is link and node.connected:
                node.connected, node.away, node.restarting = False, True, restarting
                if restarting:  # this word is the newest that it said
                    node.received_s = self._clock()
                log.warning("node_disconnected", node=node_id, address=link.address)
                self._changed(node_id)

    def _changed(self, node_id: str) -> None:
        for listener in self._listeners:
            try:
                listener(node_id)
            except Exception:  # a listener's bug must not cost the node its watch
                log.exception("listener_failed", node=node_id)


def _agent_of(report: Report) -> tuple[str, str]:
    """Which agent it is, of those that may have one name. Older ones have no token."""
    return (report.agent_token, "") if report.agent_token else (report.address, report.boot_id)


async def _tell(link: AgentLink, refusal: Refusal) -> None:
    try:
        await link.refuse(refusal)
    except SollolError as error:
        log.info("agent_not_told", address=link.address, problem=error.refusal.message)
