"""The best plan over several nodes, in predicted milliseconds per token:

    sum over devices (bytes read per token / bandwidth)
    + sum over backends (devices x (hop + round trip) + (embedding x 4 each way, the answer back) / link rate)
    + busy_ms, for each node that generates for other pools: its reads once more for each of them.

A coordinator's own CPU that holds layers is a backend too, over the loopback interface; its own GPUs cost no hop.
`search` finds the plans, the memory model has the last word on each, and a single node is left only for one that is
more than 5 % faster. Everything is in bytes and milliseconds.
"""

from collections.abc import Sequence

from msgspec import Struct
from sollol.memory import bytes_read_per_token
from sollol.report import CoordinatorPlan, DeviceShare, Model, NodeStatus, NodeVerdict, ScorePart

from sollold.placement.fit import generating
from sollold.placement.job import Job
from sollold.placement.layout import Load, bandwidth
from sollold.placement.lenders import Borrowed, Unit, coordinators, lenders, units_for
from sollold.placement.needs import Holding, Needs, needs_for
from sollold.placement.search import EQUAL_WITHIN, MOST_STATES, Found, Limits, Record, Search

MOST_CHECKED = 8  # plans that the search found and the memory model may refuse


class Split(Struct, frozen=True, kw_only=True):
    """A plan over several nodes; `parts` add up to its milliseconds per token."""

    coordinator: int  # the node's place in the list
    plan: CoordinatorPlan
    parts: tuple[ScorePart, ...]


def best_split(
    job: Job,
    nodes: Sequence[NodeStatus],
    models: Sequence[Model | None],
    verdicts: Sequence[NodeVerdict],
    solo: int | None,
) -> Split | None:
    """The plan to take instead of the single node `solo`, if there is one.

    Args:
        job: What is to be placed.
        nodes: All of them, in the order of their ids.
        models: The model on each node.
        verdicts: What the single-node policy says of each.
        solo: The place of the single node it chose.
    """
    if job.max_nodes == 1 and job.backends_per_pool is None or job.backends_per_pool == 0:
        return None
    solo_ms = None if solo is None or job.backends_per_pool else verdicts[solo].score
    if solo is not None and solo_ms is not None and not _worth_a_look(job, nodes, models[solo], solo_ms):
        return None
    able = coordinators(job, nodes, models, verdicts)
    if not able:
        return None
    borrowed = lenders(job, nodes)
    record = Record(job.max_nodes, solo_ms)
    for order, at in enumerate(able):
        _search_from(job, nodes, models[at], at, order, borrowed, record)
    for found in record.ranked()[:MOST_CHECKED]:
        at = able[found.order]
        needs = _needs(job, models[at])
        kept = found if record.states < MOST_STATES else _thinned(job, nodes, needs, at, found)
        split = _split(job, nodes, at, models[at], needs, kept)
        if split is not None:
            return split
    return None


def _worth_a_look(job: Job, nodes: Sequence[NodeStatus], model: Model | None, solo_ms: float) -> bool:
    """Whether any device could read the whole model so fast that one hop more still beats the single node."""
    if model is None or model.shape is None:
        return False
    left_ms = solo_ms / EQUAL_WITHIN - job.links.hop_s * 1000
    if left_ms <= 0:
        return False
    enough = _needs(job, model).read[-1] * 1000 / left_ms
    for node in nodes:
        engine = node.report.engine
        if engine is not None and engine.rpc:
            devices = node.report.devices
            for device in devices:
                if (device.bandwidth_bytes_per_s or bandwidth(device, devices[0])) > enough:
                    return True
    return False


def _search_from(
    job: Job,
    nodes: Sequence[NodeStatus],
    model: Model | None,
    at: int,
    order: int,
    borrowed: Sequence[Borrowed],
    record: Record,
) -> None:
    needs = _needs(job, model)
    free = nodes[at].report.devices[0].free_bytes
    if free >= needs.coordinator_bytes_alone:
        units = units_for(job, needs, nodes, at, borrowed)
        _search(job, needs, units, at, free - needs.coordinator_bytes, order, record)


def _search(job: Job, needs: Needs, units: Sequence[Unit], at: int, own_left: int, order: int, record: Record) -> None:
    limits = Limits(max_nodes=job.max_nodes, backends=job.backends_per_pool)
    Search(needs, units, record, own=at, own_left=own_left, order=order, limits=limits).run()


def _thinned(job: Job, nodes: Sequence[NodeStatus], needs: Needs, at: int, found: Found) -> Found:
    """The same plan without any node that makes it slower: a search that was cut short may have kept one."""
    own_left = nodes[at].report.devices[0].free_bytes - needs.coordinator_bytes
    while True:
        record = Record(job.max_nodes, found.cost_ms * EQUAL_WITHIN)
        for without in sorted({unit.at for unit, _ in found.path if unit.at != at}):
            units = [unit for unit, _ in found.path if unit.at != without]
            _search(job, needs, units, at, own_left, found.order, record)
        better = record.ranked()
        if not better:
            return found
        found = better[0]


def _split(
    job: Job, nodes: Sequence[NodeStatus], at: int, model: Model | None, needs: Needs, found: Found
) -> Split | None:
    """None when the memory model, asked for the whole plan, finds it too large after all."""
    held = [(unit, layers) for unit, layers in reversed(found.path)]
    holdings = [
        Holding(
            node_id=unit.node_id,
            device_id=unit.device.device_id,
            kind=unit.device.kind,
            layers=layers,
            lent=unit.lent,
        )
        for unit, layers in held
    ]
    shares = needs.shares(nodes[at].report.devices[0].device_id, holdings)
    units = [unit for unit, _ in held]
    if not _fits(nodes, at, units, shares):
        return None
    assert model is not None
    load = _load(job)
    plan = CoordinatorPlan(
        model=model.name,
        parallel=load.parallel,
        context_per_slot=needs.context_per_slot,
        shares=shares,
        kv_type=load.kv_type,
        batch=load.batch,
        ubatch=load.ubatch,
    )
    return Split(coordinator=at, plan=plan, parts=_parts(job, nodes, at, needs, units, shares))


def _fits(nodes: Sequence[NodeStatus], at: int, units: Sequence[Unit], shares: Sequence[DeviceShare]) -> bool:
    """Each share into its device; those in a node's RAM, unified memory included, together into that."""
    host = {at: shares[0].total_bytes}
    for unit, share in zip(units, shares[1:], strict=True):
        if share.total_bytes > unit.device.free_bytes:
            return False
        if unit.on_host:
            host[unit.at] = host.get(unit.at, 0) + share.total_bytes
    return all(size <= nodes[place].report.devices[0].free_bytes for place, size in host.items())


def _parts(
    job: Job, nodes: Sequence[NodeStatus], at: int, needs: Needs, units: Sequence[Unit], shares: Sequence[DeviceShare]
) -> tuple[ScorePart, ...]:
    """What each device reads, the coordinator's own first by name; what each backend's hop costs; other pools."""
    parts, hops, busy_ms = [], dict[int, list[Unit]](), 0.0
    for unit, share in zip(units, shares[1:], strict=True):
        report = nodes[unit.at].report
        speed = bandwidth(unit.device, report.devices[0])
        read_ms = bytes_read_per_token(needs.shape, share) / speed * 1000
        name = f"{unit.node_id}/{unit.device.device_id}" if unit.lent else unit.device.device_id
        parts.append(ScorePart("read_ms." + name, read_ms))
        busy_ms += read_ms * generating(report)
        if unit.lent:
            hops.setdefault(unit.at, []).append(unit)
    coordinator = nodes[at].report.node_id
    for place, lent in hops.items():
        answer = needs.answer_bytes if units[-1] in lent else 0
        hop_ms = job.links.hop_ms(
            coordinator,
            nodes[place].report.node_id,
            devices=len(lent),
            sent_bytes=needs.crossing_bytes,
            returned_bytes=needs.crossing_bytes + answer,
        )
        parts.append(ScorePart(f"hop_ms.{nodes[place].report.node_id}", hop_ms))
    return (*parts, ScorePart("busy_ms", busy_ms))


def _needs(job: Job, model: Model | None) -> Needs:
    # The filters let only models with a readable header through.
    assert model is not None
    assert model.shape is not None
    return needs_for(model.shape, _load(job))


def _load(job: Job) -> Load:
    return Load(
        context_per_slot=job.context_per_slot,
        parallel=job.parallel,
        kv_type=job.kv_type,
        batch=job.batch,
        ubatch=job.ubatch,
    )
