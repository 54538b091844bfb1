"""Starts one pool where a decision says: reserve → start → wait until ready. Cleans up what did not become one."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

import structlog
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.inference import Progress
from sollol.report import Decision, Instance, InstanceState, NodeStatus, Pool, RpcTransport

from sollold import group
from sollold.away import GONE, first_back
from sollold.load_progress import LoadProgress
from sollold.numbers import PoolNumbers

log = structlog.get_logger(__name__)

# What a failed start may take to be cleaned up before its load goes on; the cleaning itself goes on meanwhile.
RELEASE_WITHIN_S = 8.0
RELEASE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
# What the nodes' reports may take to show it.
REPORTED_WITHIN_S = 1.0
_POLL_S = 0.02


class Agent(group.Agent, Protocol):
    """The part of `AgentLink` that starting takes."""

    async def release(self, pool_id: str) -> None: ...
    def watch_instance(self, instance_id: str) -> AsyncGenerator[Instance]: ...
    async def stop(self, instance_id: str) -> None: ...


class ExplainsLosses(Protocol):
    """What `Reaper` is to this module."""

    async def explained(self, pool_id: str, refusal: Refusal) -> Refusal: ...


class UsedPools(Protocol):
    """What `Pools` is to this module."""

    def forget(self, instance_id: str) -> None: ...
    def doubt(self, instance_id: str) -> None: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...
    def link(self, node_id: str) -> Agent: ...


class Starter:
    """Owner of the starts in flight, and of the cleaning up after them.

    Args:
        lost: Knows why a pool was lost.
        pools: Told of each pool whose start went wrong: nobody shall wait for it.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        lost: ExplainsLosses,
        pools: UsedPools,
        numbers: PoolNumbers,
        reservation_ttl: timedelta,
    ) -> None:
        self._nodes = nodes
        self._lost = lost
        self._pools = pools
        self._numbers = numbers
        self._reservation_ttl = reservation_ttl
        self._releases: set[asyncio.Task[None]] = set()
        self._leaving = False

    def leave(self) -> None:
        """This head ends: what has a coordinator loads to its end without it, and the next head finds it."""
        self._leaving = True

    async def close(self) -> None:
        """End the cleaning up that still goes on; agents let go of reservations by themselves."""
        for task in tuple(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def start(self, pool_id: str, decision: Decision, on_progress: Callable[[Progress], None]) -> Pool:
        """Return the READY pool. When this fails or is cancelled, what it had started is stopped, unless we leave.

        Raises:
            SollolError: why not; a NodeRefusedError where another node than the coordinator's is at fault.
            GaveWayError: another head starts, or has started, the very pool that this one would have been.
        """
        node_id, plan = decision.coordinator, decision.plan
        if plan is None:
            raise refuse(
                Reason.MODEL_UNSUPPORTED,
                f"{decision.model}: its header is not readable on {node_id}, so no plan can be made",
            )
        model, number = plan.model, plan.pool_number
        parts = group.parts_of(plan, node_id)
        links = {part.node_id: self._nodes.link(part.node_id) for part in parts}
        transport = self._transport(node_id)
        lenders = sum(bool(part.lent) for part in parts)
        log.info("pool_starting", model=model, number=number, pool=pool_id, coordinator=node_id, backends=lenders)
        has_coordinator = False
        try:
            async with self._numbers.held(pool_id, model, number):
                await group.reserve(parts, pool_id, self._reservation_ttl, links.__getitem__)
                host = decision.coordinator_host
                await group.start(parts, pool_id, plan, host, links.__getitem__, transport=transport)
                has_coordinator = True
                instance = await self._ready(links[node_id], pool_id, node_id, on_progress)
            _check_started(instance, model, node_id)
        except BaseException as error:
            if has_coordinator and self._leaving and isinstance(error, asyncio.CancelledError):
                log.info("pool_left_loading", model=model, number=number, pool=pool_id, coordinator=node_id)
                raise
            await self._clean_up(error, pool_id, parts, links)
            raise
        at = {"node": node_id, "nodes": len(parts), "listens": instance.endpoint}
        log.info("pool_ready", model=model, number=number, pool=pool_id, **at)
        return Pool(node_id=node_id, instance=instance)

    async def _clean_up(
        self, error: BaseException, pool_id: str, parts: Sequence[group.Part], links: Mapping[str, Agent]
    ) -> None:
        """Let go of every part, and wait for that where the next placement needs the memory.

        Raises:
            NodeRefusedError: in place of the error, with the node that the next plan must do without.
        """
        blamed = error
        try:
            blamed = await self._blamed(error, pool_id, parts)
        finally:
            releases = {node_id: self._release(link, pool_id) for node_id, link in links.items()}
        # An old report may still say that it starts: nobody's hope. One that cannot be stopped is doubted later.
        self._pools.forget(pool_id)
        gone = blamed.node_id if isinstance(blamed, group.NodeRefusedError) and blamed.refusal.reason in GONE else None
        awaited = {node_id: task for node_id, task in releases.items() if node_id != gone and self._in_reach(node_id)}
        if awaited:
            await asyncio.wait(awaited.values(), timeout=RELEASE_WITHIN_S)
        if isinstance(blamed, SollolError):
            await self._reported(pool_id, awaited)
        if blamed is not error:
            raise blamed from error

    async def _reported(self, pool_id: str, node_ids: Collection[str]) -> None:
        """Wait a moment until the nodes' reports, which the next plan is made from, no longer have the pool."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + REPORTED_WITHIN_S
        while group.remains([each for each in map(self._nodes.status, node_ids) if each], {pool_id}):
            if loop.time() >= until_s:
                return
            await asyncio.sleep(_POLL_S)

    def _in_reach(self, node_id: str) -> bool:
        status = self._nodes.status(node_id)
        return status is not None and status.connected

    def _transport(self, coordinator: str) -> RpcTransport:
        """How the pool's bytes travel between its nodes; placement puts none together that differ."""
        status = self._nodes.status(coordinator)
        return RpcTransport.DIRECT if status is None else status.report.rpc_transport

    async def _blamed(self, error: BaseException, pool_id: str, parts: Sequence[group.Part]) -> BaseException:
        """The error, with the node that the next plan must do without."""
        if not isinstance(error, SollolError) or isinstance(error, group.NodeRefusedError):
            return error
        if error.refusal.reason in GONE:  # whatever has become of the pool by now, that is why
            return group.NodeRefusedError(parts[0].node_id, error.refusal)
        refusal = await self._lost.explained(pool_id, error.refusal)
        node_id = group.at_fault(refusal, pool_id, parts, self._nodes.statuses())
        return group.NodeRefusedError(node_id, refusal)

    async def _ready(
        self, link: Agent, pool_id: str, node_id: str, on_progress: Callable[[Progress], None]
    ) -> Instance:
        """Raises SollolError: why it does not come up. An agent that is restarted meanwhile takes the load up again."""
        progress = LoadProgress(node_id, self._nodes.status, on_progress)
        telling = asyncio.create_task(progress.keep_telling(), name=f"tell the progress of {pool_id}")
        try:
            while True:
                try:
                    return await _loaded(link, pool_id, node_id, progress)
                except SollolError as error:
                    if error.refusal.reason not in GONE or await first_back([node_id], self._nodes.status) is None:
                        raise
        finally:
            telling.cancel()

    def _release(self, link: Agent, pool_id: str) -> asyncio.Task[None]:
        """Stop and release what a start left; a task of its own, since the load itself may be cancelled again."""
        task = asyncio.create_task(self._stop_and_release(link, pool_id), name=f"release {pool_id}")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
        return task

    async def _stop_and_release(self, link: Agent, pool_id: str) -> None:
        """Ask an agent out of reach a few times. Then its reservation lapses, or the pool shows up as a ready one."""
        for pause_s in (*RELEASE_PAUSES_S, 0.0):
            try:
                await link.stop(pool_id)
                await link.release(pool_id)
            except SollolError as error:
                if error.refusal.reason in GONE and pause_s:
                    await asyncio.sleep(pause_s)
                    continue
                log.warning("pool_not_released", pool=pool_id, error=str(error))
                self._pools.doubt(pool_id)
            return


async def _loaded(link: Agent, pool_id: str, node_id: str, progress: LoadProgress) -> Instance:
    async with contextlib.aclosing(link.watch_instance(pool_id)) as changes:
        async for instance in changes:
            if instance.state is InstanceState.READY:
                return instance
            if instance.refusal is not None:
                raise SollolError(instance.refusal)
            if instance.state in (InstanceState.STOPPED, InstanceState.STOPPING):
                raise refuse(Reason.STOPPED, f"{pool_id} was stopped while it loaded", retryable=True)
            if instance.state is InstanceState.FAILED:
                message = f"{pool_id} failed on {node_id}, which does not say why; see its log there"
                raise refuse(Reason.ENGINE_START_FAILED, message, retryable=True)
            progress.heard(instance)
    raise refuse(Reason.AGENT_UNREACHABLE, f"{node_id} went away while {pool_id} loaded", retryable=True)


def _check_started(instance: Instance, model: str, node_id: str) -> None:
    if instance.model != model:  # its queue would never find the pool, and load again and again
        raise refuse(Reason.INTERNAL, f"{node_id} was told to start {model} and started {instance.model}")


def new_pool_id(model: str) -> str:
    """A pool id that says which model it is: `llama3.1-70b-5f0c1a2b`. Unique, safe as a file name."""
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.")[:40] or "model"
    return f"{stem}-{uuid.uuid4().hex[:8]}"
