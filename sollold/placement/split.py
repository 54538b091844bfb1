"""The best plan over several nodes, in predicted milliseconds per token:

    sum over devices (bytes read per token / bandwidth)
    + sum over backends (devices x (hop + round trip) + (embedding x 4 each way, the answer back) / link rate)
    + busy_ms: on a node that generates for other pools, its reads once more for each of them
    + observed_ms or scaled_ms: what was observed of the model, on this plan or on others, less the prediction.

A coordinator's own CPU that holds layers is a backend too, over the loopback interface; its own GPUs cost no hop.
`search` finds the plans, the memory model has the last word on each, and a single node is left only for one that is
more than 5 % faster. Of plans within 5 % one that is ready much sooner is taken. Everything is in bytes and
milliseconds, and what comes before the first token in seconds.
"""

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace
from sollol.link import PlanLink
from sollol.memory import bytes_read_per_token
from sollol.report import CoordinatorPlan, DeviceShare, Model, NodeStatus, NodeVerdict, ScorePart

from sollold.placement.corrections import corrections_for
from sollold.placement.fit import EQUAL_WITHIN, generating
from sollold.placement.found import Found, Limits, Origin, Record
from sollold.placement.job import Job
from sollold.placement.layout import bandwidth
from sollold.placement.lenders import Place, Unit, coordinators, lenders, units_for
from sollold.placement.links import measured
from sollold.placement.needs import Holding, Needs, needs_for
from sollold.placement.observed_plans import ObservedPlans
from sollold.placement.ready import moving_s, much_sooner, ready_parts
from sollold.placement.search import FEW_LAYERS, Search

# Partial plans to look at, 5 to 10 microseconds each: over the whole cluster, then over the nodes of the best plan.
# Where layers are few a plan that is one off is far off, and where devices are few all plans can be looked at.
MOST_STEPS = 1500
MOST_STEPS_AGAIN = 1000
MORE_FOR_FEW = 4
FEW_DEVICES = 12
MOST_CHECKED = 8  # plans that the search found and the memory model may refuse


class Split(Struct, frozen=True, kw_only=True):
    """A plan over several nodes; `parts` add up to its milliseconds per token, `ready` to its seconds until ready."""

    coordinator: int  # the node's place in the list
    plan: CoordinatorPlan
    parts: tuple[ScorePart, ...]
    ready: tuple[ScorePart, ...]
    links: tuple[PlanLink, ...]

    @property
    def cost_ms(self) -> float:
        return sum(part.value for part in self.parts)

    @property
    def moving_s(self) -> float:
        return moving_s(self.ready)


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
    if job.backends_per_pool == 0 or (job.max_nodes == 1 and job.backends_per_pool is None):
        return None
    solo_ms = None if solo is None or job.backends_per_pool else verdicts[solo].score
    slowest_ms = None if solo_ms is None else solo_ms / job.observed.least_factor  # that a faster plan is predicted
    if solo is not None and slowest_ms is not None and not _worth_a_look(job, nodes, models[solo], slowest_ms):
        return None
    job = replace(job, links=measured(job.links, nodes))
    able = coordinators(job, nodes, models, verdicts)
    return _Cluster(job, nodes, models).best(able, solo_ms) if able else None


class _Cluster:
    """The nodes, and one job for them."""

    def __init__(self, job: Job, nodes: Sequence[NodeStatus], models: Sequence[Model | None]) -> None:
        self._job = job
        self._nodes = nodes
        self._models = models
        self._limits = Limits(max_nodes=job.max_nodes, backends=job.backends_per_pool)
        self._observed = ObservedPlans(job, nodes)

    def best(self, able: Sequence[int], solo_ms: float | None) -> Split | None:
        """`able`: the places of the nodes that may run the coordinator, those that win a tie first."""
        borrowed, observed = lenders(self._job, self._nodes), self._job.observed
        limit_ms = None if solo_ms is None else solo_ms / observed.most_factor
        steps = MOST_STEPS * self._more(able[0], borrowed)
        record = Record(self._limits, limit_ms, steps, spread=observed.spread)
        for order, at in enumerate(able):
            origin = Origin(at, order)
            self._search(origin, self._units(origin, borrowed), record)
        ranked = record.ranked(self._cost_ms)[:MOST_CHECKED]
        for best in ranked:
            found = best if record.exhausted else self._again(best, borrowed)
            split = self._split(found)
            if split is not None:
                least = min(split.cost_ms, *map(self._cost_ms, ranked)) * EQUAL_WITHIN
                most_ms = least if solo_ms is None else min(least, solo_ms / EQUAL_WITHIN)
                if observed and solo_ms is not None and split.cost_ms > solo_ms / EQUAL_WITHIN:
                    return None
                return self._sooner(split, found, borrowed, most_ms)
        return None

    def _cost_ms(self, found: Found) -> float:
        return self._observed.cost_ms(found, self._needs(found.origin.at))

    def _sooner(self, split: Split, found: Found, borrowed: Sequence[Place], most_ms: float) -> Split:
        """The plan to take instead, of those with the same coordinator and no more nodes that take at most `most_ms`.

        The same search, with a price on each byte moved: all that is left to `most_ms`, spread over what `split` moves.
        A plan that costs less with it takes no longer than that, and moves less.
        """
        left_ms = most_ms - split.cost_ms
        if left_ms <= 0 or not much_sooner(0.0, split.moving_s):
            return split
        price = left_ms / split.moving_s
        units = [
            replace(unit, byte_ms=unit.byte_ms + price * unit.move_s) for unit in self._units(found.origin, borrowed)
        ]
        limits = replace(self._limits, max_nodes=found.nodes)
        record = Record(limits, most_ms * EQUAL_WITHIN / self._job.observed.least_factor, MOST_STEPS_AGAIN)
        self._search(found.origin, units, record)
        for better in record.ranked()[:MOST_CHECKED]:
            other = self._split(better)
            if other is not None and other.cost_ms <= most_ms and much_sooner(other.moving_s, split.moving_s):
                return other
        return split

    def _units(self, origin: Origin, borrowed: Sequence[Place]) -> list[Unit]:
        return units_for(self._job, self._needs(origin.at), self._nodes, origin.at, borrowed)

    def _search(self, origin: Origin, units: Sequence[Unit], record: Record) -> None:
        needs, free = self._needs(origin.at), self._free(origin.at)
        if free >= needs.coordinator_bytes_alone:
            Search(needs, units, record, origin, own_left=free - needs.coordinator_bytes).run()

    def _again(self, found: Found, borrowed: Sequence[Place]) -> Found:
        """The best plan on the same nodes, or all of them but one: a search that was cut short may have missed it."""
        origin = found.origin
        while True:
            taking_part = {unit.at for unit, _ in found.path} | {origin.at}
            units = [unit for unit in self._units(origin, borrowed) if unit.at in taking_part]
            record = Record(self._limits, found.cost_ms * EQUAL_WITHIN, 0)
            ways = (None, *sorted(taking_part - {origin.at}))
            for without in ways:
                record.steps_left = MOST_STEPS_AGAIN * self._more(origin.at, borrowed) // len(ways)
                self._search(origin, [unit for unit in units if unit.at != without], record)
            better = record.ranked()
            if not better or better[0].cost_ms >= found.cost_ms:
                return found
            found = better[0]

    def _split(self, found: Found) -> Split | None:
        """None when the memory model, asked for the whole plan, finds it too large after all."""
        at = found.origin.at
        model, needs, job = self._models[at], self._needs(at), self._job
        assert model is not None
        units = [unit for unit, _ in reversed(found.path)]
        holdings = [_holding(unit, layers) for unit, layers in reversed(found.path)]
        shares = needs.shares(self._nodes[at].report.devices[0].device_id, holdings)
        if not self._fits(at, units, shares):
            return None
        parts = [*self._read_parts(needs, units, shares), *self._hop_parts(at, needs, units)]
        predicted_ms = sum(part.value for part in parts if part.name != "busy_ms")
        plan = CoordinatorPlan(
            model=model.name,
            parallel=job.parallel,
            context_per_slot=needs.context_per_slot,
            shares=shares,
            kv_type=job.kv_type,
            batch=job.batch,
            ubatch=job.ubatch,
            predicted_ms_per_token=predicted_ms,
        )
        own_id, links = self._nodes[at].report.node_id, job.links
        return Split(
            coordinator=at,
            plan=plan,
            parts=(*parts, *self._observed.part(at, shares, predicted_ms)),
            ready=ready_parts(own_id, model, plan, links),
            links=tuple(links.in_plan(own_id, node_id) for node_id in _others(plan, own_id)),
        )

    def _fits(self, at: int, units: Sequence[Unit], shares: Sequence[DeviceShare]) -> bool:
        """Each share into its device; those in a node's RAM, unified memory included, together into that."""
        host, beside = {at: shares[0].total_bytes}, {at: 0}
        for unit, share in zip(units, shares[1:], strict=True):
            if share.total_bytes > unit.device.free_bytes:
                return False
            if unit.on_host:
                host[unit.at] = host.get(unit.at, 0) + share.total_bytes
            beside[unit.at] = max(beside.get(unit.at, 0), share.host_bytes)
        return all(host.get(place, 0) + size <= self._free(place) for place, size in beside.items())

    def _read_parts(self, needs: Needs, units: Sequence[Unit], shares: Sequence[DeviceShare]) -> list[ScorePart]:
        """What each device reads, and what other pools on their nodes cost."""
        parts, busy_ms = [], 0.0
        for unit, share in zip(units, shares[1:], strict=True):
            report = self._nodes[unit.at].report
            speed = bandwidth(unit.device, report.devices[0])
            read_ms = bytes_read_per_token(needs.shape, share) / speed * 1000
            name = f"{unit.node_id}/{unit.device.device_id}" if unit.lent else unit.device.device_id
            parts.append(ScorePart("read_ms." + name, read_ms))
            busy_ms += read_ms * generating(report)
        return [*parts, ScorePart("busy_ms", busy_ms)]

    def _hop_parts(self, at: int, needs: Needs, units: Sequence[Unit]) -> list[ScorePart]:
        backends: dict[str, list[Unit]] = {}
        for unit in units:
            if unit.lent:
                backends.setdefault(unit.node_id, []).append(unit)
        coordinator = self._nodes[at].report.node_id
        crossing = needs.crossing_bytes
        return [
            ScorePart(
                "hop_ms." + node_id,
                self._job.links.hop_ms(
                    coordinator,
                    node_id,
                    devices=len(lent),
                    sent_bytes=crossing,
                    returned_bytes=crossing + (needs.answer_bytes if units[-1] in lent else 0),
                ),
            )
            for node_id, lent in backends.items()
        ]

    def _free(self, at: int) -> int:
        return self._nodes[at].report.devices[0].free_bytes

    def _more(self, at: int, borrowed: Sequence[Place]) -> int:
        few = self._needs(at).every <= FEW_LAYERS and len(borrowed) <= FEW_DEVICES
        return MORE_FOR_FEW if few else 1

    def _needs(self, at: int) -> Needs:
        return _needs(self._job, self._models[at])


def _worth_a_look(job: Job, nodes: Sequence[NodeStatus], model: Model | None, solo_ms: float) -> bool:
    """Whether any device could read the whole model so fast that one hop more still beats the single node."""
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


def _others(plan: CoordinatorPlan, own_id: str) -> dict[str, None]:
    """The other nodes of the plan, in the order of the layers."""
    return dict.fromkeys(share.node_id for share in plan.shares if share.node_id not in ("", own_id))


def _holding(unit: Unit, layers: int) -> Holding:
    device = unit.device
    return Holding(node_id=unit.node_id, device_id=device.device_id, kind=device.kind, layers=layers, lent=unit.lent)


def _needs(job: Job, model: Model | None) -> Needs:
    # The filters let only models with a readable header through.
    assert model is not None
    assert model.shape is not None
    load = job.load
    return needs_for(model.shape, load, corrections_for(job.learned, model.shape, load))
