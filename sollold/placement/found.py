"""Plans over several nodes that a search has in hand."""

from collections.abc import Callable
from math import inf
from operator import attrgetter

from msgspec import Struct

from sollold.placement.fit import EQUAL_WITHIN
from sollold.placement.lenders import Unit


class Origin(Struct, frozen=True):
    """The coordinator's node: its place in the list of nodes, and in the order that ties are broken in."""

    at: int
    order: int


class Found(Struct, frozen=True):
    """One whole plan: units with their layers, from the last layer to the first."""

    cost_ms: float
    nodes: int
    origin: Origin
    path: tuple[tuple[Unit, int], ...]


class Limits(Struct, frozen=True, kw_only=True):
    max_nodes: int
    backends: int | None  # exactly so many


class Record:
    """The plans in hand, over all coordinators; `solo_ms` is what the best single node takes.

    `spread`: of two plans the one that is predicted to take longer, up to so many times, may turn out the faster.
    """

    def __init__(self, limits: Limits, solo_ms: float | None, steps: int, *, spread: float = 1.0) -> None:
        self.limits = limits
        self.steps_left = steps
        self.exhausted = True  # whether every plan was looked at, or known to be no better
        limit = inf if solo_ms is None else solo_ms / EQUAL_WITHIN
        self._at_most = [limit] * (limits.max_nodes + 1)  # the least cost with so many nodes or fewer
        self._spread = spread
        self._found: list[Found] = []

    def promising(self, bound_ms: float, nodes: int) -> bool:
        at_most = self._at_most
        bound_ms /= self._spread
        return bound_ms < at_most[min(nodes, len(at_most) - 1)] and bound_ms <= at_most[-1] * EQUAL_WITHIN

    def add(self, found: Found) -> None:
        if not self.promising(found.cost_ms, found.nodes):
            return
        self._found.append(found)
        for nodes in range(found.nodes, len(self._at_most)):
            self._at_most[nodes] = min(self._at_most[nodes], found.cost_ms)

    def ranked(self, cost_ms: Callable[[Found], float] = attrgetter("cost_ms")) -> list[Found]:
        """The best first, by what `cost_ms` says of each: of those within 5 % of the least the fewest nodes, then the
        coordinator that wins ties.

        The rest follows by cost, for when what comes first turns out not to fit.
        """
        costs = [(cost_ms(found), found) for found in self._found]
        limit = min((cost for cost, _ in costs), default=0.0) * EQUAL_WITHIN
        equal = [(found.nodes, found.origin.order, cost, at) for at, (cost, found) in enumerate(costs) if cost <= limit]
        rest = [(cost, found.nodes, found.origin.order, at) for at, (cost, found) in enumerate(costs) if cost > limit]
        return [self._found[order[-1]] for order in (*sorted(equal), *sorted(rest))]
