"""Who may take part in a plan over several nodes, and what each of their devices costs there.

A coordinator passes every filter but that of memory, has the file and an engine with RPC. A backend's node needs no
file; its report is fresh, it is in reach, not cordoned, has the required labels, and the coordinator's own engine
build, RPC protocol and transport. Pinning, `local`, minimum CPUs and minimum memory speak of the coordinator.
"""

from collections.abc import Sequence

from msgspec import Struct
from sollol.report import Device, DeviceKind, Model, NodeStatus, NodeVerdict

from sollold.placement.filters import cordoned, label_missing, out_of_reach, stale_report
from sollold.placement.fit import generating
from sollold.placement.job import Job
from sollold.placement.layout import bandwidth
from sollold.placement.needs import Needs
from sollold.placement.preference import tie_order

OWN_BACKEND = -1  # the group of the coordinator's own CPU
# Beyond these a search looks at the fastest devices and the roomiest, and at the coordinators with the fastest device.
FASTEST = 24
ROOMIEST = 8
MAX_COORDINATORS = 8


class Unit(Struct, frozen=True, kw_only=True):
    """A device that can hold layers for one coordinator. Times are milliseconds."""

    at: int  # the node's place in the list of nodes
    group: int  # units of a group are neighbours in a plan; one backend, or the coordinator's own GPUs
    rank: int  # the device's place in its node's report, which is the engine's order
    node_id: str
    device: Device
    lent: bool
    free_bytes: int
    on_host: bool  # takes its bytes out of the node's RAM
    host_bytes: int  # free of that, beside what a backend that lends this device takes
    byte_ms: float  # for each byte read, with the turns that other pools on the node take
    first_ms: float  # for the first device of a backend
    more_ms: float  # for each further one
    answer_ms: float  # for holding the output layer
    move_s: float  # for each byte of its layers, once, before the model is ready
    room_bytes: int  # free for layers
    tie: tuple[int, int, int, str]


Place = tuple[int, int]  # the node's place in the list of nodes, the device's in its report


def coordinators(
    job: Job, nodes: Sequence[NodeStatus], models: Sequence[Model | None], verdicts: Sequence[NodeVerdict]
) -> list[int]:
    """Places of the nodes that may run the coordinator, those that win a tie first."""
    able = [
        at
        for at, (node, model, verdict) in enumerate(zip(nodes, models, verdicts, strict=True))
        if model is not None and has_rpc(node) and (verdict.refusal is None or only_short(verdict))
    ]
    if len(able) > MAX_COORDINATORS:
        able.sort(key=lambda at: (_fastest_byte_ms(nodes[at]), tie_order(job, nodes[at].report)))
        del able[MAX_COORDINATORS:]
    return sorted(able, key=lambda at: tie_order(job, nodes[at].report))


def only_short(verdict: NodeVerdict) -> bool:
    """Whether every filter let the node through and only a whole model does not fit."""
    return verdict.refusal is not None and "largest_layers" in verdict.refusal.numbers


def lenders(job: Job, nodes: Sequence[NodeStatus]) -> list[Place]:
    """The devices that a coordinator may borrow; the most useful ones, when there are very many."""
    found = [
        (at, rank)
        for at, node in enumerate(nodes)
        if may_lend(job, node)
        for rank, device in enumerate(node.report.devices)
        if _can_hold(device)
    ]
    if len(found) <= FASTEST + ROOMIEST:
        return found

    def by_speed(place: Place) -> tuple[float, int, tuple[int, int, int, str], int]:
        at, rank = place
        return (_byte_ms(nodes[at], rank), -_free(nodes[at], rank), tie_order(job, nodes[at].report), rank)

    found.sort(key=by_speed)
    roomiest = sorted(found[FASTEST:], key=lambda place: (by_speed(place)[1], by_speed(place)))
    return found[:FASTEST] + roomiest[:ROOMIEST]


def may_lend(job: Job, node: NodeStatus) -> bool:
    return (
        has_rpc(node)
        and stale_report(job, node, None) is None
        and out_of_reach(job, node, None) is None
        and cordoned(job, node, None) is None
        and label_missing(job, node, None) is None
    )


def has_rpc(node: NodeStatus) -> bool:
    engine = node.report.engine
    return engine is not None and engine.rpc


def units_for(job: Job, needs: Needs, nodes: Sequence[NodeStatus], own: int, borrowed: Sequence[Place]) -> list[Unit]:
    """Every device that can hold layers for the coordinator on `nodes[own]`: its own, then others' in its reach."""
    own_id = nodes[own].report.node_id
    places = [(own, rank) for rank, device in enumerate(nodes[own].report.devices) if _can_hold(device)]
    for at, rank in borrowed:
        ram = nodes[at].report.devices[0].free_bytes
        reached = job.links.reaches(own_id, nodes[at].report.node_id) and same_transport(nodes[own], nodes[at])
        if at != own and reached and (rank == 0 or ram >= needs.host_bytes) and same_engine(nodes[own], nodes[at]):
            places.append((at, rank))
    units = [_unit(job, needs, nodes, own, place) for place in places]
    return [unit for unit in units if unit.room_bytes > 0]


def _unit(job: Job, needs: Needs, nodes: Sequence[NodeStatus], own: int, place: Place) -> Unit:
    at, rank = place
    report = nodes[at].report
    device = report.devices[rank]
    on_cpu = device.kind is DeviceKind.CPU
    lent = at != own or on_cpu
    own_id, links = nodes[own].report.node_id, job.links
    there, back = links.between(own_id, report.node_id), links.between(report.node_id, own_id)
    hop_ms = (links.hop_s + there.rtt_s) * 1000
    crossing_ms = needs.crossing_bytes * (1 / there.bytes_per_s + 1 / back.bytes_per_s) * 1000
    free = _free(nodes[at], rank)
    if at != own and device.unified:
        free = min(free, report.devices[0].free_bytes - needs.beside_bytes(device.kind))
    return Unit(
        at=at,
        group=OWN_BACKEND if at == own and on_cpu else at,
        rank=rank,
        node_id=report.node_id,
        device=device,
        lent=lent,
        free_bytes=free,
        on_host=on_cpu or device.unified,
        host_bytes=report.devices[0].free_bytes - (needs.beside_bytes(device.kind) if at != own else 0),
        byte_ms=_byte_ms(nodes[at], rank),
        first_ms=hop_ms + crossing_ms if lent else 0.0,
        more_ms=hop_ms if lent else 0.0,
        answer_ms=needs.answer_bytes / back.bytes_per_s * 1000 if lent else 0.0,
        move_s=1 / there.bytes_per_s if lent else 0.0,
        room_bytes=free - needs.fixed_bytes(device.kind),
        tie=tie_order(job, report),
    )


def _can_hold(device: Device) -> bool:
    return device.kind is DeviceKind.CPU or device.usable


def _free(node: NodeStatus, rank: int) -> int:
    cpu, device = node.report.devices[0], node.report.devices[rank]
    return min(device.free_bytes, cpu.free_bytes) if device.unified else device.free_bytes


def _byte_ms(node: NodeStatus, rank: int) -> float:
    devices = node.report.devices
    return 1000 * (1 + generating(node.report)) / bandwidth(devices[rank], devices[0])


def _fastest_byte_ms(node: NodeStatus) -> float:
    return min(_byte_ms(node, rank) for rank, device in enumerate(node.report.devices) if _can_hold(device))


def same_engine(one: NodeStatus, other: NodeStatus) -> bool:
    a, b = one.report.engine, other.report.engine
    return a is not None and b is not None and (a.build, a.rpc_protocol) == (b.build, b.rpc_protocol)


def same_transport(one: NodeStatus, other: NodeStatus) -> bool:
    return one.report.rpc_transport is other.report.rpc_transport
