"""What a token pays for crossing from one node to another and back, and whether it can cross at all."""

from collections.abc import Sequence

from msgspec import Struct, field
from msgspec.structs import replace
from sollol.link import PlanLink
from sollol.report import NodeStatus

# How long the word of a node that it cannot reach another one keeps the two apart. It tries every few seconds.
UNREACHABLE_FOR_S = 60.0


class Link(Struct, frozen=True, kw_only=True):
    """From one node to another: seconds for a round trip, bytes per second one way; `age_s` is None when assumed."""

    rtt_s: float
    bytes_per_s: float
    age_s: float | None = None


# Where nobody has measured: gigabit Ethernet through one switch; the loopback interface with a forwarder behind it.
DEFAULT_LINK = Link(rtt_s=0.0005, bytes_per_s=117e6)
OWN_NODE = Link(rtt_s=0.00005, bytes_per_s=2e9)
# What each hand-over costs beside the network: the engine splits its graph, serialises, waits, and a forwarder copies.
# 0.7 to 1.7 ms per token and backend were measured over loopback on two busy cores.
DEFAULT_HOP_S = 0.001


class Links(Struct, frozen=True, kw_only=True):
    """Links by their two node ids, from the first to the second; the other way where only that was measured.

    `unreachable` are pairs whose first node could not reach the second; `default` is for those nobody has measured.
    """

    known: dict[tuple[str, str], Link] = field(default_factory=dict)
    unreachable: frozenset[tuple[str, str]] = frozenset()
    default: Link = DEFAULT_LINK
    own_node: Link = OWN_NODE
    hop_s: float = DEFAULT_HOP_S

    def between(self, one: str, other: str) -> Link:
        if one == other:
            return self.own_node
        return self.known.get((one, other)) or self.known.get((other, one)) or self.default

    def reaches(self, coordinator: str, backend: str) -> bool:
        """False when the coordinator's node has tried and failed lately; it is the one that connects."""
        return (coordinator, backend) not in self.unreachable

    def in_plan(self, coordinator: str, backend: str) -> PlanLink:
        """For the record: the slower of both ways."""
        there, back = self.between(coordinator, backend), self.between(backend, coordinator)
        return PlanLink(
            node_id=backend,
            rtt_s=there.rtt_s,
            bytes_per_s=min(there.bytes_per_s, back.bytes_per_s),
            age_s=there.age_s,
        )

    def hop_ms(self, coordinator: str, backend: str, *, devices: int, sent_bytes: int, returned_bytes: int) -> float:
        """Milliseconds per token that one backend adds to what its devices read.

        One round trip and the bytes both ways; each further device of the same backend is handed its input there, and
        costs another round trip without bytes.
        """
        there, back = self.between(coordinator, backend), self.between(backend, coordinator)
        crossing_s = sent_bytes / there.bytes_per_s + returned_bytes / back.bytes_per_s
        return (devices * (self.hop_s + there.rtt_s) + crossing_s) * 1000


def measured(links: Links, nodes: Sequence[NodeStatus]) -> Links:
    """`links` with all that the nodes' reports say, which counts more."""
    known, unreachable = dict(links.known), set(links.unreachable)
    addresses: dict[str, str] = {}
    for node in nodes:
        for link in node.report.links:
            pair = (node.report.node_id, link.node_id)
            age_s = link.age_s + node.report_age_s
            if link.unreachable:
                addresses = addresses or {each.report.node_id: each.report.address for each in nodes}
                if age_s <= UNREACHABLE_FOR_S and addresses.get(link.node_id) == link.address:
                    unreachable.add(pair)
            elif link.bytes_per_s > 0:
                known[pair] = Link(rtt_s=link.rtt_s, bytes_per_s=link.bytes_per_s, age_s=age_s)
    return replace(links, known=known, unreachable=frozenset(unreachable))
