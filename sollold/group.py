"""One pool's parts on the nodes it spans: what each reserves and lends, started together and let go together."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from operator import attrgetter
from typing import Protocol, TypeVar

from msgspec.structs import replace
from sollol.correction import CPU_ID
from sollol.errors import SUSPECTED_BACKENDS, Reason, Refusal, Retry, SollolError
from sollol.identity import POOL_SECRET_BYTES
from sollol.report import (
    BackendEndpoint,
    CoordinatorPlan,
    Instance,
    InstanceKind,
    InstanceState,
    NodeStatus,
    RpcTransport,
)

T = TypeVar("T")

ATTACH_WITHIN_S = 60.0
_OVER = frozenset({InstanceState.FAILED, InstanceState.STOPPED, InstanceState.BACKOFF})
# Of a coordinator: its agent ends it. It holds its memory until then, and will never serve again.
_GIVEN_UP = _OVER | {InstanceState.LOST}
# What a coordinator says when a backend of it went away under it.
_LOST_BACKEND = frozenset({Reason.ENGINE_DIED, Reason.ENGINE_STALLED, Reason.ENGINE_START_FAILED})


class Agent(Protocol):
    """The part of `AgentLink` that a group takes."""

    async def reserve(self, pool_id: str, bytes_by_device: Mapping[str, int], ttl: timedelta) -> None: ...
    async def start_backend(
        self,
        pool_id: str,
        device_ids: Sequence[str],
        *,
        allowed_hosts: Sequence[str],
        attach_within_s: float,
        upload_bytes: int,
        coordinator_node: str,
        pool_secret: bytes,
    ) -> BackendEndpoint: ...
    async def start_coordinator(self, pool_id: str, plan: CoordinatorPlan) -> Instance: ...


class NodeRefusedError(SollolError):
    """Raised when one node of a group said no: it is the one to leave out of the next plan."""

    def __init__(self, node_id: str, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.node_id = node_id


@dataclass
class Part:
    """One node's part of a plan: bytes by device, the coordinator's own included, the devices it lends, and the weights
    that are sent to those.
    """

    node_id: str
    bytes: dict[str, int] = field(default_factory=dict)
    lent: list[str] = field(default_factory=list)
    upload_bytes: int = 0


def parts_of(plan: CoordinatorPlan, coordinator: str) -> tuple[Part, ...]:
    """The coordinator's part first, then the lenders' in the order of the layers."""
    parts = {coordinator: Part(coordinator)}
    beside: dict[str, int] = {}
    for share in plan.shares:
        node_id = share.node_id or coordinator
        part = parts.setdefault(node_id, Part(node_id))
        part.bytes[share.device_id] = part.bytes.get(share.device_id, 0) + share.total_bytes
        if share.node_id and share.layers:
            part.lent.append(share.device_id)
            part.upload_bytes += share.weight_bytes
        if share.host_bytes:
            beside[node_id] = max(beside.get(node_id, 0), share.host_bytes)
    for node_id, size in beside.items():
        parts[node_id].bytes[CPU_ID] = parts[node_id].bytes.get(CPU_ID, 0) + size
    return tuple(parts.values())


async def reserve(parts: Iterable[Part], pool_id: str, ttl: timedelta, link: Callable[[str], Agent]) -> None:
    """Reserve every part. All or nothing is the caller's: on any refusal it releases the whole group.

    One node after another, in the order of their ids, which is every head's: of those that race for the same nodes one
    gets them all. Asked all at once, each could get some and refuse the others the rest.

    Raises:
        NodeRefusedError: the first refusal; the nodes behind it were not asked.
    """
    for part in sorted(parts, key=attrgetter("node_id")):
        try:
            await link(part.node_id).reserve(pool_id, part.bytes, ttl)
        except SollolError as error:
            raise NodeRefusedError(part.node_id, error.refusal) from error


async def start(
    parts: Sequence[Part],
    pool_id: str,
    plan: CoordinatorPlan,
    coordinator_host: str,
    link: Callable[[str], Agent],
    *,
    transport: RpcTransport,
) -> None:
    """Start the backends, then the coordinator. Only their agents and we know the secret that lets it in.

    Raises:
        NodeRefusedError: as `reserve`, of a backend.
        SollolError: why the coordinator was refused.
    """
    secret = secrets.token_bytes(POOL_SECRET_BYTES) if transport is RpcTransport.TUNNEL else b""
    backends = await start_backends(parts, pool_id, coordinator_host, link, secret)
    shown = secret if any(backend.tunnelled for backend in backends) else b""
    plan = replace(plan, backends=backends, pool_secret=shown)
    await link(parts[0].node_id).start_coordinator(pool_id, plan)


async def start_backends(
    parts: Sequence[Part], pool_id: str, coordinator_host: str, link: Callable[[str], Agent], secret: bytes
) -> tuple[BackendEndpoint, ...]:
    """Start a backend on every node that lends; each admits the coordinator's node and nobody else.

    Its agent shows the secret, where bytes go through tunnels; without one it is who comes from `coordinator_host`.

    Raises:
        NodeRefusedError: as `reserve`.
    """
    lenders, coordinator = [part for part in parts if part.lent], parts[0].node_id
    starts = (
        link(part.node_id).start_backend(
            pool_id,
            part.lent,
            allowed_hosts=(coordinator_host,),
            attach_within_s=ATTACH_WITHIN_S,
            upload_bytes=part.upload_bytes,
            coordinator_node=coordinator,
            pool_secret=secret if part.node_id != coordinator else b"",
        )
        for part in lenders
    )
    endpoints = await _on_all([(part.node_id, start) for part, start in zip(lenders, starts, strict=True)])
    return tuple(replace(endpoint, node_id=part.node_id) for part, endpoint in zip(lenders, endpoints, strict=True))


async def _on_all(calls: Sequence[tuple[str, Awaitable[T]]]) -> list[T]:
    results = await asyncio.gather(*(call for _, call in calls), return_exceptions=True)
    done: list[T] = []
    for (node_id, _), result in zip(calls, results, strict=True):
        if isinstance(result, SollolError):
            raise NodeRefusedError(node_id, result.refusal) from result
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def at_fault(refusal: Refusal, pool_id: str, parts: Sequence[Part], statuses: Iterable[NodeStatus]) -> str:
    """The node to leave out after a group's coordinator failed: a lender that is gone, else the coordinator's own."""
    if refusal.reason in _LOST_BACKEND:
        seen = {status.report.node_id: status for status in statuses}
        for part in parts[1:]:
            status = seen.get(part.node_id)
            if status is None or not status.connected or not _lends(status.report.instances, pool_id):
                return part.node_id
    return parts[0].node_id


def _lends(instances: Iterable[Instance], pool_id: str) -> bool:
    return any(
        instance.pool_id == pool_id and instance.kind is InstanceKind.BACKEND and instance.state not in _OVER
        for instance in instances
    )


def losses(statuses: Sequence[NodeStatus], lost_nodes: Collection[str]) -> dict[str, Refusal]:
    """Pool id to why it cannot serve any more, of pools that leave something behind, which only holds memory.

    Those are pools that span nodes, and those whose coordinator its agent is still about to end. A pool without any
    coordinator in the reports may be one that another head is just starting, and one whose nodes are all lost may be
    well: perhaps it is us who cannot see them.
    """
    seen = {status.report.node_id: status for status in statuses}
    return {
        instance.pool_id: why
        for status in statuses
        for instance in status.report.instances
        if instance.kind is InstanceKind.COORDINATOR
        and ((lenders := _lenders(instance)) or instance.state is InstanceState.LOST)
        and not {status.report.node_id, *lenders} <= set(lost_nodes)
        and (why := _loss(instance, status.report.node_id, lenders, seen, lost_nodes)) is not None
    }


def _lenders(coordinator: Instance) -> tuple[str, ...]:
    return tuple(dict.fromkeys(share.node_id for share in coordinator.shares if share.node_id))


def _loss(
    coordinator: Instance,
    node_id: str,
    lenders: Iterable[str],
    seen: Mapping[str, NodeStatus],
    lost_nodes: Collection[str],
) -> Refusal | None:
    pool_id = coordinator.pool_id
    over = coordinator.state in _GIVEN_UP
    if over and not (coordinator.refusal and SUSPECTED_BACKENDS in coordinator.refusal.numbers):
        return coordinator.refusal or _gone(pool_id, f"its coordinator on {node_id} has ended")
    if node_id in lost_nodes:
        return _gone(pool_id, f"its coordinator's node {node_id} is lost", Reason.AGENT_UNREACHABLE)
    for lender in lenders:
        if lender in lost_nodes:
            return _gone(pool_id, f"node {lender} is lost, and the layers there with it")
        status = seen.get(lender)
        ended = _ended_backend(status.report.instances, pool_id) if status is not None else None
        if ended is not None:
            return _gone(pool_id, ended.refusal.message if ended.refusal else f"its backend on {lender} has ended")
    return coordinator.refusal if over else None


def _ended_backend(instances: Iterable[Instance], pool_id: str) -> Instance | None:
    """What the node lent to this pool and, as it says, does no more; one that says nothing may say so late."""
    for instance in instances:
        if instance.pool_id == pool_id and instance.kind is InstanceKind.BACKEND and instance.state in _OVER:
            return instance
    return None


def _gone(pool_id: str, why: str, reason: Reason = Reason.ENGINE_DIED) -> Refusal:
    message = f"pool {pool_id} is lost: {why}; ask again, and the model is placed on the nodes that are left"
    return Refusal(reason=reason, message=message, retry=Retry.RETRYABLE)


def remains(statuses: Sequence[NodeStatus], lost_pools: Container[str]) -> tuple[tuple[str, str], ...]:
    """(node id, pool id) wherever a lost pool still has a process or a reservation, on nodes that can be asked."""
    return tuple(
        (status.report.node_id, pool_id)
        for status in statuses
        if status.connected
        for pool_id in dict.fromkeys(
            (
                *(each.pool_id for each in status.report.instances if each.state not in _OVER),
                *(each.pool_id for each in status.report.reservations),
            )
        )
        if pool_id in lost_pools
    )
