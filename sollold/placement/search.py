"""Looks for the fastest ways to deal a model's layers to the devices of several nodes.

Plans are built from the last layer to the first: pick a device, give it the layers before those that are dealt, go on
with what is left. The cost of a plan is linear in what each device reads plus a fixed price for each one that takes
part, so in a best plan every device but one is full, and with equal layers that one can hold the first of them. A
device that shares its place in the order (the coordinator's own GPUs come last, where the engine puts them) or comes
first here may also be the one that is not full. Small models, and those with unequal layers, are tried with less than
full devices too.

What is cut off: partial plans that cannot end better than a plan in hand with as few nodes (a linear relaxation says
so), and devices that another free one beats in speed, room and distance alike. Up to `MOST_STATES` partial plans are
looked at; clusters of a few unequal nodes never reach that, and the answer is then the best there is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import inf

from msgspec import Struct

from sollold.placement.lenders import Unit
from sollold.placement.needs import Needs

EQUAL_WITHIN = 1.05
MOST_STATES = 2500
MAX_DEVICES = 15
FEW_LAYERS = 13
SLACK = 2  # layers fewer than full that are tried where layers are unequal


class Found(Struct, frozen=True):
    """One whole plan: units with their layers, from the last layer to the first."""

    cost_ms: float
    nodes: int
    order: int  # of the coordinator among those tried
    path: tuple[tuple[Unit, int], ...]


class Limits(Struct, frozen=True, kw_only=True):
    max_nodes: int
    backends: int | None  # exactly so many


class Record:
    """The plans in hand, over all coordinators; `solo_ms` is what the best single node takes."""

    def __init__(self, max_nodes: int, solo_ms: float | None) -> None:
        limit = inf if solo_ms is None else solo_ms / EQUAL_WITHIN
        self._at_most = [limit] * (max_nodes + 1)  # the least cost with so many nodes or fewer
        self._found: list[Found] = []
        self.states = 0

    def promising(self, bound_ms: float, nodes: int) -> bool:
        at_most = self._at_most
        return bound_ms < at_most[nodes] and bound_ms <= at_most[-1] * EQUAL_WITHIN

    def add(self, found: Found) -> None:
        if not self.promising(found.cost_ms, found.nodes):
            return
        self._found.append(found)
        for nodes in range(found.nodes, len(self._at_most)):
            self._at_most[nodes] = min(self._at_most[nodes], found.cost_ms)

    def ranked(self) -> list[Found]:
        """The best first: of those within 5 % of the least cost the fewest nodes, then the coordinator that wins ties.

        The rest follows by cost, for when what comes first turns out not to fit.
        """
        least = min((found.cost_ms for found in self._found), default=0.0)
        equal = [found for found in self._found if found.cost_ms <= least * EQUAL_WITHIN]
        rest = [found for found in self._found if found.cost_ms > least * EQUAL_WITHIN]
        equal.sort(key=lambda found: (found.nodes, found.order, found.cost_ms))
        rest.sort(key=lambda found: (found.cost_ms, found.nodes, found.order))
        return equal + rest


class State(Struct, frozen=True):
    """A plan for the layers from `stop` on."""

    stop: int
    used: int = 0  # bits, by the units' places
    closed: int = 0  # the same, for those whose group has taken part
    cost_ms: float = 0.0
    nodes: int = 1
    backends: int = 0
    last: Unit | None = None
    host_left: int = 0  # RAM of the last unit's node
    own_left: int = 0  # RAM of the coordinator's node
    path: tuple[tuple[Unit, int], ...] = ()


class Search:
    """For one coordinator, on node `own`; `own_left` of its RAM remain beside what it needs itself."""

    def __init__(
        self,
        needs: Needs,
        units: Sequence[Unit],
        record: Record,
        *,
        own: int,
        own_left: int,
        order: int,
        limits: Limits,
    ) -> None:
        self._needs = needs
        self._record = record
        self._own = own
        self._order = order
        self._limits = limits
        sizes = Counter(unit.group for unit in units)
        rated = [(*_rated(unit, needs, alone=sizes[unit.group] == 1), unit) for unit in units]
        rated.sort(key=lambda item: (item[0], -item[1], item[2].tie, item[2].rank))
        self._units = [unit for _, _, unit in rated]
        self._rates = [(1 << at, rate, room) for at, (rate, room, _) in enumerate(rated)]
        singles = [unit.at != own and sizes[unit.group] == 1 for unit in self._units]
        self._beaten_by = [_beaten_by(at, self._units, singles) for at in range(len(units))]
        self._group_bits = [
            sum(1 << at for at, other in enumerate(self._units) if other.group == unit.group) for unit in self._units
        ]
        self._seen: dict[tuple[int, int, int | None], float] = {}
        self._start = State(needs.every, own_left=own_left)
        self._thorough = False

    def run(self) -> None:
        """Full devices first, which finds good plans quickly; then, with those as limits, the rest."""
        self._extend(self._start)
        self._thorough = True
        self._seen.clear()
        self._extend(self._start)

    def _extend(self, state: State) -> None:
        record = self._record
        key = (state.used, state.stop, None if state.last is None else state.last.group)
        if record.states >= MOST_STATES or self._seen.get(key, inf) <= state.cost_ms:
            return
        record.states += 1
        self._seen[key] = state.cost_ms
        children: list[tuple[float, int, State]] = []
        for at, unit in enumerate(self._units):
            if self._open(state, at, unit):
                for child in self._children(state, at, unit):
                    bound = child.cost_ms + self._rest_ms(child)
                    if record.promising(bound, child.nodes):
                        children.append((bound, len(children), child))
        children.sort()
        for bound, _, child in children:
            if child.stop == 0:
                self._complete(child)
            elif record.promising(bound, child.nodes):
                self._extend(child)

    def _open(self, state: State, at: int, unit: Unit) -> bool:
        """Whether this unit may come next; those of one group stand together, in the engine's order."""
        if state.used >> at & 1 or self._beaten_by[at] & ~state.used:
            return False
        if state.last is not None and unit.group == state.last.group:
            return unit.rank < state.last.rank
        if state.closed >> at & 1:
            return False
        if not unit.lent:
            return state.backends == 0
        limits = self._limits
        if unit.at != self._own and state.nodes >= limits.max_nodes:
            return False
        return limits.backends is None or state.backends < limits.backends

    def _children(self, state: State, at: int, unit: Unit) -> Iterator[State]:
        needs = self._needs
        kind = unit.device.kind
        joined = state.last is not None and unit.group == state.last.group
        left = state.own_left if unit.at == self._own else state.host_left if joined else unit.host_bytes
        free = min(unit.free_bytes, left) if unit.on_host else unit.free_bytes
        backends = state.backends + (unit.lent and not joined)
        fixed_ms = unit.more_ms if joined else unit.first_ms
        if not state.path:
            fixed_ms += unit.answer_ms
        for first in self._firsts(state, unit, free, backends):
            taken = needs.range_bytes(first, state.stop, kind) if unit.on_host else 0
            yield State(
                first,
                state.used | 1 << at,
                state.closed | self._group_bits[at],
                state.cost_ms + fixed_ms + (needs.read[state.stop] - needs.read[first]) * unit.byte_ms,
                state.nodes + (unit.at != self._own and not joined),
                backends,
                unit,
                left - taken,
                state.own_left - taken if unit.at == self._own else state.own_left,
                (*state.path, (unit, state.stop - first)),
            )

    def _firsts(self, state: State, unit: Unit, free: int, backends: int) -> Iterator[int]:
        """The first layers that this unit may hold up to `state.stop`, the fullest first."""
        needs = self._needs
        still = 0 if self._limits.backends is None else self._limits.backends - backends  # backends that must follow
        first = needs.first_that_fits(state.stop, free, unit.device.kind)
        if not state.path:
            if not still and needs.alone_bytes(unit.device.kind) <= free:
                yield 0
            if state.own_left < 0:
                return  # the coordinator has room for the buffers of one device, not for those of several
            first = max(first, 1)
        first = max(first, still)
        if first >= state.stop or len(state.path) >= MAX_DEVICES:
            return
        yield first
        if not self._thorough:
            return
        if needs.every <= FEW_LAYERS or not state.path or not unit.lent:
            yield from range(first + 1, state.stop)
        elif not needs.even:
            yield from range(first + 1, min(first + 1 + SLACK, state.stop))

    def _rest_ms(self, state: State) -> float:
        """Not more than what dealing the rest can cost: each device's fixed price spread over all it has room for."""
        rest = float(self._needs.read[state.stop])
        total = 0.0
        for bit, rate, room in self._rates:
            if rest <= 0:
                break
            if not state.used & bit:
                take = min(rest, room)
                total += take * rate
                rest -= take
        return total if rest <= 1 else inf

    def _complete(self, state: State) -> None:
        limits = self._limits
        if limits.backends is None:
            if state.nodes == 1:
                return  # one node needs no backend: that is the single node's own business
        elif state.backends != limits.backends:
            return
        self._record.add(Found(state.cost_ms, state.nodes, self._order, state.path))


def _rated(unit: Unit, needs: Needs, *, alone: bool) -> tuple[float, float]:
    """The least that a byte read on this unit can cost, its fixed price included, and how many it has room for."""
    room = unit.room_bytes / needs.least_held
    fixed_ms = unit.first_ms if alone else unit.more_ms
    return unit.byte_ms + fixed_ms / room, room


def _beaten_by(at: int, units: Sequence[Unit], singles: Sequence[bool]) -> int:
    """Bits of the units that could take any range in this one's place at no higher cost. Equals: the earlier ones."""
    if not singles[at]:
        return 0
    unit = units[at]
    mine = (unit.byte_ms, unit.first_ms, unit.answer_ms, -unit.room_bytes)
    bits = 0
    for place, other in enumerate(units):
        if place == at or not singles[place] or other.device.kind is not unit.device.kind:
            continue
        theirs = (other.byte_ms, other.first_ms, other.answer_ms, -other.room_bytes)
        if (theirs != mine or place < at) and all(one <= two for one, two in zip(theirs, mine, strict=True)):
            bits |= 1 << place
    return bits
