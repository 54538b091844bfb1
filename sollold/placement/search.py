"""Looks for the fastest ways to deal a model's layers to the devices of several nodes.

Plans are built from the last layer to the first: pick a device, give it layers, go on with what is left. The cost of a
plan is linear in what each device reads plus a fixed price for each that takes part, so in a best plan every device but
one is full, and with equal layers that one can be given the first of them. A sweep keeps the `WIDTH` most promising
partial plans with full devices at each step. Where layers or devices are few, a second, exhaustive search then tries
fewer layers on a device too.

Left out are partial plans that cannot end better than one in hand with as few nodes (a linear relaxation says so) and,
in the sweep, devices that another free one beats in speed, room and distance alike. After as many steps as the record
allows, the best so far is taken. On clusters of a few nodes and models of a few layers the search ends before, with the
best plan there is. Over 8 and 16 unequal nodes with 80 layers and hardly enough memory, 41 of 42 plans were within 5 %
of the best that any wider search found, one 8.8 % slower.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

from msgspec import Struct

from sollold.placement.found import Found, Origin, Record
from sollold.placement.lenders import Unit
from sollold.placement.needs import Needs

MAX_DEVICES = 15  # beside the CPU: the engine asserts it
FEW_LAYERS = 13
FEW_UNITS = 6
WIDTH = 12
# So that a sweep comes to its end, where the plans are, when it has not many steps left.
RUNNING_OUT = 500
NARROW = 3
SLACK = 2  # layers fewer than full that are tried where layers are unequal


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
    """For one coordinator; `own_left` bytes of its node's RAM remain beside what it needs itself."""

    def __init__(self, needs: Needs, units: Sequence[Unit], record: Record, origin: Origin, *, own_left: int) -> None:
        self._needs = needs
        self._record = record
        self._origin = origin
        self._own = own = origin.at
        self._limits = record.limits
        sizes = Counter(unit.group for unit in units)
        rated = [(*_rated(unit, needs, alone=sizes[unit.group] == 1), unit) for unit in units]
        rated.sort(key=lambda item: (item[0], -item[1], item[2].tie, item[2].rank))
        self._units = [unit for _, _, unit in rated]
        self._rates = [(1 << at, rate, room) for at, (rate, room, _) in enumerate(rated)]
        singles = [unit.at != own and sizes[unit.group] == 1 for unit in self._units]
        self._beaten_by, self._twins = _rivals(self._units, singles)
        self._group_bits = [
            sum(1 << at for at, other in enumerate(self._units) if other.group == unit.group) for unit in self._units
        ]
        self._rooms: Counter[int] = Counter({own: 0})
        for _, room, unit in rated:
            self._rooms[unit.at] += int(room) + 1
        self._roomiest = list(accumulate(sorted((self._rooms[at] for at in self._rooms if at != own), reverse=True)))
        self._seen: dict[tuple[int, int, int | None], float] = {}
        self._start = State(needs.every, own_left=own_left)
        self._thorough = False

    def run(self) -> None:
        """The most promising partial plans first, which finds good ones quickly; then all, where that is affordable."""
        self._sweep()
        if self._needs.every <= FEW_LAYERS or len(self._units) <= FEW_UNITS:
            self._thorough = True
            self._beaten_by = self._twins
            self._extend(self._start, 0.0)
        if self._needs.every > FEW_LAYERS or self._record.steps_left <= 0:
            self._record.exhausted = False

    def _sweep(self) -> None:
        states = [self._start]
        while states and self._record.steps_left > 0:
            best: dict[int, tuple[float, int, int, int]] = {}  # of plans with the same units the order matters little
            for place, state in enumerate(states):
                for bound, at, first in self._ways_on(state):
                    if first == 0:
                        self._complete(self._child(state, at, first))
                        continue
                    used = state.used | 1 << at
                    if used not in best or bound < best[used][0]:
                        best[used] = (bound, place, first, at)
            width = WIDTH if self._record.steps_left > RUNNING_OUT else NARROW
            kept = sorted(best.values())[:width]
            states = [self._child(states[place], at, first) for _, place, first, at in kept]

    def _extend(self, state: State, bound: float) -> None:
        record = self._record
        key = (state.used, state.stop, None if state.last is None else state.last.group)
        if record.steps_left <= 0 or self._seen.get(key, inf) <= bound:
            return
        self._seen[key] = bound
        for least, at, first in sorted(self._ways_on(state)):
            if not record.promising(least, state.nodes):
                return
            child = self._child(state, at, first)
            if child.stop == 0:
                self._complete(child)
            else:
                self._extend(child, least)

    def _ways_on(self, state: State) -> Iterator[tuple[float, int, int]]:
        """What plans cost at least that go on from this one, the place of the next unit and its first layer."""
        for at, unit in enumerate(self._units):
            if self._open(state, at, unit):
                for bound, first in self._tried(state, at, unit):
                    yield bound, at, first

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

    def _tried(self, state: State, at: int, unit: Unit) -> Iterator[tuple[float, int]]:
        """What plans cost at least that go on with this unit, and the first layer it holds in them."""
        joined = state.last is not None and unit.group == state.last.group
        nodes = state.nodes + (unit.at != self._own and not joined)
        used = state.used | 1 << at
        for first in self._firsts(state, unit, joined=joined):
            self._record.steps_left -= 1
            bound = self._cost_ms(state, unit, first, joined=joined) + self._rest_ms(used, first)
            if self._record.promising(bound, nodes + self._more_nodes(first, unit)):
                yield bound, first

    def _child(self, state: State, at: int, first: int) -> State:
        unit = self._units[at]
        joined = state.last is not None and unit.group == state.last.group
        taken = self._needs.range_bytes(first, state.stop, unit.device.kind) if unit.on_host else 0
        return State(
            first,
            state.used | 1 << at,
            state.closed | self._group_bits[at],
            self._cost_ms(state, unit, first, joined=joined),
            state.nodes + (unit.at != self._own and not joined),
            state.backends + (unit.lent and not joined),
            unit,
            self._host_left(state, unit, joined=joined) - taken,
            state.own_left - taken if unit.at == self._own else state.own_left,
            (*state.path, (unit, state.stop - first)),
        )

    def _cost_ms(self, state: State, unit: Unit, first: int, *, joined: bool) -> float:
        read = self._needs.read
        fixed_ms = unit.more_ms if joined else unit.first_ms
        answer_ms = 0.0 if state.path else unit.answer_ms
        return state.cost_ms + fixed_ms + answer_ms + (read[state.stop] - read[first]) * unit.byte_ms

    def _host_left(self, state: State, unit: Unit, *, joined: bool) -> int:
        if unit.at == self._own:
            return state.own_left
        return state.host_left if joined else unit.host_bytes

    def _firsts(self, state: State, unit: Unit, *, joined: bool) -> Iterator[int]:
        """The first layers that this unit may hold up to `state.stop`, the fullest first."""
        needs = self._needs
        left = self._host_left(state, unit, joined=joined)
        free = min(unit.free_bytes, left) if unit.on_host else unit.free_bytes
        still = 0  # backends that must follow
        if self._limits.backends is not None:
            still = self._limits.backends - state.backends - (unit.lent and not joined)
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

    def _rest_ms(self, used: int, stop: int) -> float:
        """Not more than what dealing the rest can cost: each device's fixed price spread over all it has room for."""
        rest = float(self._needs.read[stop])
        total = 0.0
        for bit, rate, room in self._rates:
            if rest <= room and not used & bit:
                return total + rest * rate
            if not used & bit:
                total += room * rate
                rest -= room
        return total if rest <= 1 else inf

    def _more_nodes(self, stop: int, last: Unit) -> int:
        """Not more than how many nodes must still join: the roomiest ones, after those that take part already."""
        rest = self._needs.read[stop] - self._rooms[self._own] - self._rooms[last.at]
        return bisect_left(self._roomiest, rest) + 1 if rest > 0 else 0

    def _complete(self, state: State) -> None:
        limits = self._limits
        if limits.backends is None:
            if state.nodes == 1:
                return  # one node needs no backend: that is the single node's own business
        elif state.backends != limits.backends:
            return
        self._record.add(Found(state.cost_ms, state.nodes, self._origin, state.path))


def _rated(unit: Unit, needs: Needs, *, alone: bool) -> tuple[float, float]:
    """The least that a byte read on this unit can cost, its fixed price included, and how many it has room for."""
    room = unit.room_bytes / needs.least_held
    fixed_ms = unit.first_ms if alone else unit.more_ms
    return unit.byte_ms + fixed_ms / room, room


def _rivals(units: Sequence[Unit], singles: Sequence[bool]) -> tuple[list[int], list[int]]:
    """For each unit, bits of those to use before it: all that could take any range in its place at no higher cost.

    Of equals, which are the second list, the earlier ones. The first list is a short cut: where memory is tight, a unit
    may have to come before one that beats it, for the sake of the layers that it would get there.
    """
    beaten, twins = [0] * len(units), [0] * len(units)
    traits = [(unit.byte_ms, unit.first_ms, unit.answer_ms, -unit.room_bytes) for unit in units]
    for at, unit in enumerate(units):
        for place, other in enumerate(units):
            if place == at or not (singles[at] and singles[place]) or other.device.kind is not unit.device.kind:
                continue
            if traits[place] == traits[at]:
                beaten[at] |= (place < at) << place
                twins[at] |= (place < at) << place
            elif all(theirs <= mine for theirs, mine in zip(traits[place], traits[at], strict=True)):
                beaten[at] |= 1 << place
    return beaten, twins
