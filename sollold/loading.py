"""Loads a model: decide → reserve → start → wait until ready. One call, one pool, or one reason why not."""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

import structlog
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, SollolError, refuse
from sollol.inference import Progress
from sollol.report import (
    Decision,
    Instance,
    InstanceState,
    NodeStatus,
    PlacementWish,
    Pool,
)

from sollold import group
from sollold.away import GONE, is_back
from sollold.load_progress import LoadProgress
from sollold.numbers import PoolNumbers

log = structlog.get_logger(__name__)

MAX_ATTEMPTS = 4
# What a failed start may take to be cleaned up before its load goes on; the cleaning itself goes on meanwhile.
RELEASE_WITHIN_S = 8.0
RELEASE_PAUSES_S = (0.5, 1.0, 2.0, 4.0)

# After these the same start may succeed on another node; after anything else it would fail there too.
ELSEWHERE = frozenset(
    {
        Reason.STALE_REPORT,
        Reason.CORDONED,
        Reason.MEMORY_SHORT,
        Reason.OUT_OF_MEMORY,
        Reason.AGENT_UNREACHABLE,
        Reason.BACKING_OFF,
        Reason.ENGINE_MISSING,
        Reason.ENGINE_START_FAILED,
        Reason.ENGINE_DIED,
        Reason.ENGINE_STALLED,
        Reason.PORT_TAKEN,
        Reason.TRANSPORT_MISMATCH,
        Reason.MODEL_ABSENT,
        Reason.MODEL_NOT_FOUND,
        Reason.MODEL_CORRUPT,
        Reason.RESERVATION_MISSING,
        Reason.INSTANCE_NOT_FOUND,
        Reason.SHUTTING_DOWN,
        Reason.INTERNAL,
    }
)


class Agent(group.Agent, Protocol):
    """The part of `AgentLink` that starting takes."""

    async def release(self, pool_id: str) -> None: ...
    def watch_instance(self, instance_id: str) -> AsyncGenerator[Instance]: ...
    async def stop(self, instance_id: str) -> None: ...


class LostPools(Protocol):
    """What `Reaper` is to this module."""

    async def settled(self) -> None: ...
    async def explained(self, pool_id: str, refusal: Refusal) -> Refusal: ...


class UsedPools(Protocol):
    """What `Pools` is to this module."""

    def forget(self, instance_id: str) -> None: ...
    def doubt(self, instance_id: str) -> None: ...


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def status(self, node_id: str) -> NodeStatus | None: ...
    def link(self, node_id: str) -> Agent: ...


class Loader:
    """Starts pools.

    Args:
        decide: Placement, given the wish and the nodes still in question.
        record: Told every decision; must not block.
        lost: Knows what lost pools leave behind; nothing is placed before their memory is free again.
        pools: Told of each pool whose start went wrong: nobody shall wait for it.
        load_timeout_s: From the first placement to ready, attempts on several nodes together.
    """

    def __init__(
        self,
        nodes: ClusterView,
        *,
        decide: Callable[[PlacementWish, Sequence[NodeStatus]], Decision],
        record: Callable[[Decision], None],
        lost: LostPools,
        pools: UsedPools,
        numbers: PoolNumbers,
        reservation_ttl: timedelta,
        load_timeout_s: float,
    ) -> None:
        self._nodes = nodes
        self._decide = decide
        self._record = record
        self._lost = lost
        self._pools = pools
        self._numbers = numbers
        self._reservation_ttl = reservation_ttl
        self._load_timeout_s = load_timeout_s
        self._releases: set[asyncio.Task[None]] = set()

    async def load(self, wish: PlacementWish, number: int, on_progress: Callable[[Progress], None]) -> Pool:
        """Return a READY pool of the model. When this fails or is cancelled, what it had started is stopped.

        Raises:
            SollolError: no node fits (NO_FIT with the node-by-node table), LOAD_TIMEOUT, or the last node's reason for
                failing.
            GaveWayError: another head starts, or has started, the very pool that this one would have been.
        """
        try:
            async with asyncio.timeout(self._load_timeout_s):
                return await self._load_somewhere(wish, number, on_progress)
        except TimeoutError as error:
            raise refuse(
                Reason.LOAD_TIMEOUT, f"{wish.model} was not ready within {self._load_timeout_s:.0f} s", retryable=True
            ) from error

    def limit(self, load_timeout_s: float) -> None:
        """For loads that begin from now on."""
        self._load_timeout_s = load_timeout_s

    async def close(self) -> None:
        """End the cleaning up that still goes on; agents let go of reservations by themselves."""
        for task in tuple(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _load_somewhere(self, wish: PlacementWish, number: int, on_progress: Callable[[Progress], None]) -> Pool:
        failed: dict[str, Refusal] = {}
        await self._lost.settled()
        for _ in range(MAX_ATTEMPTS):
            on_progress(Progress(state="placing"))
            decision = self._placed(wish, number, failed)
            try:
                return await self._start(decision, on_progress)
            except SollolError as error:
                refusal = error.refusal
                node_id = error.node_id if isinstance(error, group.NodeRefusedError) else decision.coordinator
                log.warning(
                    "start_refused",
                    model=wish.model,
                    node=node_id,
                    reason=refusal.reason,
                    why=refusal.message,
                )
                failed[node_id] = refusal
                if refusal.reason not in ELSEWHERE:
                    break
        raise SollolError(_last_word(failed))

    def _placed(self, wish: PlacementWish, number: int, failed: Mapping[str, Refusal]) -> Decision:
        candidates = [status for status in self._nodes.statuses() if status.report.node_id not in failed]
        if failed and not candidates:
            raise SollolError(_last_word(failed))
        decision = self._decide(wish, candidates)
        if decision.plan is not None:
            # The name that was asked for, which on this node may be an alias: queues find the pool under it.
            decision = replace(decision, plan=replace(decision.plan, model=wish.model, pool_number=number))
        self._record(decision)
        if decision.refusal is not None:
            # What a node answered when asked is nearer to the truth than that nothing else is left.
            raise SollolError(_last_word(failed) if failed else decision.refusal)
        return decision

    async def _start(self, decision: Decision, on_progress: Callable[[Progress], None]) -> Pool:
        node_id, plan = decision.coordinator, decision.plan
        if plan is None:
            raise refuse(
                Reason.MODEL_UNSUPPORTED,
                f"{decision.model}: its header is not readable on {node_id}, so no plan can be made",
            )
        model, number = plan.model, plan.pool_number
        parts = group.parts_of(plan, node_id)
        transports = {each.report.node_id: each.report.rpc_transport for each in self._nodes.statuses()}
        transport = group.check_transports(parts, transports)
        links = {part.node_id: self._nodes.link(part.node_id) for part in parts}
        pool_id = new_pool_id(model)
        lenders = sum(bool(part.lent) for part in parts)
        log.info("pool_starting", model=model, number=number, pool=pool_id, coordinator=node_id, backends=lenders)
        try:
            async with self._numbers.held(pool_id, model, number):
                await group.reserve(parts, pool_id, self._reservation_ttl, links.__getitem__)
                host = decision.coordinator_host
                await group.start(parts, pool_id, plan, host, links.__getitem__, transport=transport)
                instance = await self._ready(links[node_id], pool_id, node_id, on_progress)
            _check_started(instance, model, node_id)
        except BaseException as error:
            try:
                blamed = await self._blamed(error, pool_id, parts)
            finally:
                releases = [self._release(link, pool_id) for link in links.values()]
            # An old report may still say that it starts: nobody's hope. One that cannot be stopped is doubted later.
            self._pools.forget(pool_id)
            if not (isinstance(error, SollolError) and error.refusal.reason in GONE):
                await asyncio.wait(releases, timeout=RELEASE_WITHIN_S)  # the next placement needs the memory
            if blamed is not error:
                raise blamed from error
            raise
        at = {"node": node_id, "nodes": len(parts), "listens": instance.endpoint}
        log.info("pool_ready", model=model, number=number, pool=pool_id, **at)
        return Pool(node_id=node_id, instance=instance)

    async def _blamed(self, error: BaseException, pool_id: str, parts: Sequence[group.Part]) -> BaseException:
        """The error, with the node that the next plan must do without."""
        if not isinstance(error, SollolError) or isinstance(error, group.NodeRefusedError):
            return error
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
                    if error.refusal.reason not in GONE or not await is_back(lambda: self._nodes.status(node_id)):
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
            progress.heard(instance)
    raise refuse(Reason.AGENT_UNREACHABLE, f"{node_id} went away while {pool_id} loaded", retryable=True)


def _check_started(instance: Instance, model: str, node_id: str) -> None:
    if instance.model != model:  # its queue would never find the pool, and load again and again
        raise refuse(Reason.INTERNAL, f"{node_id} was told to start {model} and started {instance.model}")


def _last_word(failed: Mapping[str, Refusal]) -> Refusal:
    """Why the last node failed, with a word on those before it."""
    *earlier, (node_id, last) = failed.items()
    if not earlier:
        return last
    others = "; ".join(f"{node}: {refusal.reason}" for node, refusal in earlier)
    return replace(last, message=f"{node_id}: {last.message} (tried before: {others})")


def new_pool_id(model: str) -> str:
    """A pool id that says which model it is: `llama3.1-70b-5f0c1a2b`. Unique, safe as a file name."""
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-.")[:40] or "model"
    return f"{stem}-{uuid.uuid4().hex[:8]}"
