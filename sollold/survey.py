"""Which link between two nodes is to be measured next: a pure decision over the reports, the same on every head.

Heads do not talk to each other about it. What one had measured, the others see in the measuring node's report.
"""

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import permutations
from math import inf

from msgspec import Struct
from sollol.link import Link
from sollol.report import InstanceKind, InstanceState, NodeStatus

from sollold.placement.lenders import has_rpc, same_engine

MEASURED_FOR_S = 600.0
# Of more nodes than these the ones that placement looks at first: every link of a thousand would take days.
MOST_NODES = 32

Pair = tuple[str, str]  # node ids: who measures, and to whom


class Due(Struct, frozen=True, kw_only=True):
    """`node_id` is to be asked for its link to `peer_id`, whose agent is at this address."""

    node_id: str
    peer_id: str
    host: str
    port: int

    @property
    def pair(self) -> Pair:
        return self.node_id, self.peer_id


def due(statuses: Sequence[NodeStatus], *, besides: Container[Pair] = frozenset()) -> Due | None:
    """The link that is most overdue, those that nobody has measured in either direction first.

    Only between two nodes of which one could run a coordinator and the other lend to it, and never while one of them
    generates, loads, or is about to: the measurement would disturb and be disturbed. It waits then, however long.

    Args:
        statuses: Every node that the head knows.
        besides: Pairs to leave out; those that could not be measured a moment ago.
    """
    working = _working(statuses)
    able = _first([each for each in statuses if _takes_part(each)])
    free = [each for each in able if each.report.node_id not in working]
    ages = {(one.report.node_id, link.node_id): (one, link) for one in able for link in one.report.links}
    best, best_rank = None, (1.0, 0.0)
    for one, other in _pairs(free):
        pair = (one.report.node_id, other.report.node_id)
        if pair in besides:
            continue
        rank = (_overdue(ages.get(pair), other), _overdue(ages.get((pair[1], pair[0])), one))
        if rank > best_rank:
            best_rank = rank
            best = Due(node_id=pair[0], peer_id=pair[1], host=other.report.host, port=other.report.port)
    return best


def _takes_part(status: NodeStatus) -> bool:
    return status.connected and has_rpc(status) and not status.report.cordoned


def _first(able: list[NodeStatus]) -> list[NodeStatus]:
    """By what does not change from one report to the next, so that the same ones stay the first."""
    if len(able) > MOST_NODES:
        able.sort(key=lambda each: (-max(device.bandwidth_bytes_per_s for device in each.report.devices), _size(each)))
    return able[:MOST_NODES]


def _size(status: NodeStatus) -> tuple[int, str]:
    return -sum(device.total_bytes for device in status.report.devices), status.report.node_id


def _pairs(nodes: Iterable[NodeStatus]) -> Iterator[tuple[NodeStatus, NodeStatus]]:
    ordered = sorted(nodes, key=lambda each: each.report.node_id)
    for one, other in permutations(ordered, 2):
        if (one.report.models or other.report.models) and same_engine(one, other):
            yield one, other


def _overdue(known: tuple[NodeStatus, Link] | None, peer: NodeStatus) -> float:
    """How many times over a measurement's life is past; infinite for none, or one of before the peer's last move.

    An agent that cannot reach the peer tries again by itself.
    """
    if known is None:
        return inf
    status, link = known
    if link.address != peer.report.address:
        return inf
    if link.unreachable:
        return 0.0
    return (link.age_s + status.report_age_s) / MEASURED_FOR_S if link.boot_id == peer.report.boot_id else inf


def _working(statuses: Iterable[NodeStatus]) -> set[str]:
    """Nodes that generate or load, those that lend to a coordinator that does included, or have promised to."""
    found = set()
    for status in statuses:
        report = status.report
        if any(reservation.expires_in_s is not None for reservation in report.reservations):
            found.add(report.node_id)
        for instance in report.instances:
            if instance.active_streams or instance.state is InstanceState.STARTING:
                found.add(report.node_id)
                if instance.kind is InstanceKind.COORDINATOR:
                    found.update(share.node_id for share in instance.shares if share.node_id)
    return found
