"""What a token pays for crossing from one node to another and back."""

from msgspec import Struct, field


class Link(Struct, frozen=True, kw_only=True):
    """Between two nodes: seconds for a round trip, bytes per second one way."""

    rtt_s: float
    bytes_per_s: float


# Until agents have measured: gigabit Ethernet through one switch; the loopback interface with a forwarder behind it.
DEFAULT_LINK = Link(rtt_s=0.0005, bytes_per_s=117e6)
OWN_NODE = Link(rtt_s=0.00005, bytes_per_s=2e9)
# What each hand-over costs beside the network: the engine splits its graph, serialises, waits, and a forwarder copies.
# 0.7 to 1.7 ms per token and backend were measured over loopback on two busy cores.
DEFAULT_HOP_S = 0.001


class Links(Struct, frozen=True, kw_only=True):
    """Links by their two node ids, in either order; `default` for pairs that nobody has measured."""

    known: dict[tuple[str, str], Link] = field(default_factory=dict)
    default: Link = DEFAULT_LINK
    own_node: Link = OWN_NODE
    hop_s: float = DEFAULT_HOP_S

    def between(self, one: str, other: str) -> Link:
        if one == other:
            return self.own_node
        return self.known.get((one, other)) or self.known.get((other, one)) or self.default

    def hop_ms(self, coordinator: str, backend: str, *, devices: int, sent_bytes: int, returned_bytes: int) -> float:
        """Milliseconds per token that one backend adds to what its devices read.

        One round trip and the bytes both ways; each further device of the same backend is handed its input there, and
        costs another round trip without bytes.
        """
        link = self.between(coordinator, backend)
        crossing = (sent_bytes + returned_bytes) / link.bytes_per_s
        return (devices * (self.hop_s + link.rtt_s) + crossing) * 1000
