"""The pools that agents report, by model, and how many of their slots this head uses.

A pool is usable when its connected agent's newest report says READY, or when a load of ours just made it so. One that
failed a stream is left alone until its agent reports again, one on a node that is away until it is back or lost; one
that is known to be gone is never used again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from msgspec.structs import replace
from sollol.errors import Refusal
from sollol.report import Instance, InstanceKind, InstanceState, NodeStatus, Pool, Report

from sollold.away import is_away
from sollold.drain import nodes_of

GONE_REMEMBERED = 4096
_PROMISING = frozenset({InstanceState.STARTING, InstanceState.READY})


@dataclass(eq=False)
class PoolSlots:
    """One pool, how many of its slots this head uses, and how many others used when its agent last reported."""

    node_id: str
    instance: Instance
    used: int = 0
    elsewhere: int = 0

    @property
    def free(self) -> int:
        """Below 0 when the pool came back with fewer slots than are in use."""
        return max(1, self.instance.parallel) - self.used

    @property
    def order(self) -> tuple[int, int, str]:
        """The highest is taken first: the least busy, of equals the lowest number."""
        return self.free - self.elsewhere, -self.instance.pool_number, self.instance.instance_id


class PoolIndex:
    """Owner of the slot counts. What a call costs depends on the node or model it is about, not on the cluster."""

    def __init__(self) -> None:
        # By model and instance id: usable ones, and those that may become usable with their agent's next report.
        self._ready: dict[str, dict[str, PoolSlots]] = {}
        self._pending: dict[str, dict[str, Pool]] = {}
        # Usable ones, and others that still have streams: the count must be right when such a pool comes back.
        self._slots: dict[str, PoolSlots] = {}
        self._listed: dict[str, list[Instance]] = {}
        self._reports: dict[str, Report] = {}
        self._doubted: dict[str, str] = {}
        self._adopted: dict[str, Pool] = {}
        self._gone: dict[str, Refusal | None] = {}  # by instance id; why, for those that are lost
        self._away: frozenset[str] = frozenset()  # nodes out of reach, and not lost yet
        self._draining: frozenset[str] = frozenset()  # nodes; pools with a part there take no new streams

    def update(self, node_id: str, status: NodeStatus | None) -> set[str]:
        """Take in what a node reports now, None when it is forgotten. Returns the models it has pools of, or had."""
        away = status is not None and is_away(status)
        self._away = self._away | {node_id} if away else self._away - {node_id}
        report = status.report if status is not None and (status.connected or away) else None
        if report is None or report is not self._reports.get(node_id):
            self._doubted = {key: node for key, node in self._doubted.items() if node != node_id}
        before = self._listed.pop(node_id, [])
        for instance in before:
            self._unlist(instance)
        if report is None:
            self._reports.pop(node_id, None)
            self._adopted = {key: pool for key, pool in self._adopted.items() if pool.node_id != node_id}
            return {instance.model for instance in before}
        self._reports[node_id] = report
        drains = report.draining != (node_id in self._draining)
        self._draining ^= {node_id} if drains else set()
        now = list(self._known(node_id, report))
        for instance in now:
            self._list(node_id, instance)
        return {instance.model for instance in (*before, *now, *(self._list_again(node_id) if drains else ()))}

    def _list_again(self, lender: str) -> list[Instance]:
        """The pools of other nodes that have a part on this one, which is drained from now on, or is so no longer."""
        touched = [
            (node_id, instance)
            for node_id, listed in self._listed.items()
            for instance in listed
            if node_id != lender and lender in nodes_of(node_id, instance)
        ]
        for node_id, instance in touched:
            self._listed[node_id].remove(instance)
            self._unlist(instance)
            self._list(node_id, instance)
        return [instance for _, instance in touched]

    def _known(self, node_id: str, report: Report) -> Iterator[Instance]:
        """The node's pools that are usable or may become so."""
        adopted, self._adopted = self._adopted, {}
        for instance in report.instances:
            instance_id = instance.instance_id
            if instance.kind is not InstanceKind.COORDINATOR:
                continue
            if instance_id in self._gone or instance.state not in _PROMISING:
                continue
            if instance_id in adopted and instance.state is InstanceState.STARTING:
                # A report from before the pool was ready may come after our load ended.
                self._adopted[instance_id] = adopted[instance_id]
                yield adopted[instance_id].instance
            else:
                yield instance
        self._adopted.update((key, pool) for key, pool in adopted.items() if pool.node_id != node_id)

    def _list(self, node_id: str, instance: Instance) -> None:
        self._listed.setdefault(node_id, []).append(instance)
        instance_id = instance.instance_id
        if not self._draining.isdisjoint(nodes_of(node_id, instance)):
            if instance_id in self._slots:
                slots = self._slots[instance_id]
                slots.elsewhere = max(0, instance.active_streams - slots.used)
        elif instance.state is InstanceState.READY and instance_id not in self._doubted and node_id not in self._away:
            slots = self._slots.setdefault(instance_id, PoolSlots(node_id, instance))
            slots.instance = instance
            slots.elsewhere = max(0, instance.active_streams - slots.used)
            self._ready.setdefault(instance.model, {})[instance_id] = slots
        else:
            self._pending.setdefault(instance.model, {})[instance_id] = Pool(node_id=node_id, instance=instance)

    def _unlist(self, instance: Instance) -> None:
        for by_model in (self._ready, self._pending):
            pools = by_model.get(instance.model, {})
            pools.pop(instance.instance_id, None)
            if not pools:
                by_model.pop(instance.model, None)
        self._drop_unused(instance.instance_id)

    def _drop_unused(self, instance_id: str) -> None:
        slots = self._slots.get(instance_id)
        if slots is not None and not slots.used and not self._is_ready(slots.instance):
            del self._slots[instance_id]

    def _is_ready(self, instance: Instance) -> bool:
        return instance.instance_id in self._ready.get(instance.model, {})

    def adopt(self, pool: Pool) -> None:
        """Use a pool that just became ready, before any report says so."""
        instance_id = pool.instance.instance_id
        if instance_id in self._gone or self._is_ready(pool.instance):
            return
        self._adopted[instance_id] = pool
        self._away -= {pool.node_id}
        listed = self._listed.get(pool.node_id, [])
        self._listed[pool.node_id] = [instance for instance in listed if instance.instance_id != instance_id]
        self._unlist(pool.instance)
        self._list(pool.node_id, pool.instance)

    def forget(self, instance_id: str, why: Refusal | None = None) -> str | None:
        """This pool is gone, whatever older reports say; for good when it is known why. Returns the model it was of."""
        self._gone[instance_id] = why or self._gone.get(instance_id)
        if len(self._gone) > GONE_REMEMBERED:
            del self._gone[next(iter(self._gone))]
        self._adopted.pop(instance_id, None)
        for instances in self._listed.values():
            for instance in instances:
                if instance.instance_id == instance_id:
                    instances.remove(instance)
                    self._unlist(instance)
                    return instance.model
        return None

    def doubt(self, instance_id: str) -> None:
        """This pool failed us, and its agent's next report decides; until then nobody uses it or loads another."""
        if self._gone.get(instance_id) is None:  # not for good
            self._gone.pop(instance_id, None)
        slots = self._slots.get(instance_id)
        if slots is None or not self._is_ready(slots.instance):
            return
        self._doubted[instance_id] = slots.node_id
        self._unlist(slots.instance)
        pending = self._pending.setdefault(slots.instance.model, {})
        pending[instance_id] = Pool(node_id=slots.node_id, instance=slots.instance)

    def take(self, model: str) -> PoolSlots | None:
        """A slot of the usable pool that has most of them free; None when this head uses all.

        What others use decides only which pool: reports are a moment old, and engines queue what comes too early.
        """
        free = (slots for slots in self._ready.get(model, {}).values() if slots.free > 0)
        best = max(free, key=attrgetter("order"), default=None)
        if best is not None:
            best.used += 1
        return best

    def release(self, slots: PoolSlots) -> None:
        slots.used -= 1
        self._drop_unused(slots.instance.instance_id)

    def in_use(self, instance_id: str) -> int:
        """How many of its slots this head uses."""
        slots = self._slots.get(instance_id)
        return slots.used if slots is not None else 0

    def newest(self, instance: Instance) -> Instance:
        """A reported instance as this head knows it now: its own loads and streams are newer than any report."""
        adopted = self._adopted.get(instance.instance_id)
        instance = instance if adopted is None else adopted.instance
        slots = self._slots.get(instance.instance_id)
        return instance if slots is None else replace(instance, active_streams=slots.used + slots.elsewhere)

    def ready(self, model: str) -> tuple[Pool, ...]:
        """Every usable pool, whether or not it has a free slot, in the order of their numbers."""
        pools = [Pool(node_id=slots.node_id, instance=slots.instance) for slots in self._ready.get(model, {}).values()]
        return tuple(sorted(pools, key=lambda pool: (pool.instance.pool_number, pool.instance.instance_id)))

    def counts(self, model: str) -> tuple[int, int]:
        """How many pools are usable, and how many may become so."""
        return len(self._ready.get(model, ())), len(self._pending.get(model, ()))

    def pending(self, model: str) -> Pool | None:
        """Some pool that its agent's next report may make usable."""
        for pool in self._pending.get(model, {}).values():
            return pool
        return None
