"""Links between nodes, as agents measure them and as plans count with them: values, as those of `sollol.report`."""

from msgspec import Struct


class Link(Struct, frozen=True, kw_only=True):
    """From the node that reports it to another; without figures when that one was `unreachable`."""

    node_id: str
    unreachable: bool = False
    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    age_s: float = 0.0
    boot_id: str = ""
    address: str = ""


class PlanLink(Struct, frozen=True, kw_only=True):
    """A link as a plan counts with it; `age_s` is None when it was assumed, never measured."""

    node_id: str
    rtt_s: float
    bytes_per_s: float
    age_s: float | None = None
