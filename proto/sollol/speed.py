"""How fast models ran on plans: what agents observe, and heads correct their predictions with. Pure."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:  # reports hold observations
    from sollol.report import DeviceShare

_CPU = "CPU"


class SpeedObservation(Struct, frozen=True, kw_only=True):
    """`identity` is that of the model's file on the coordinator's node; the next three are a `PlanKey`'s."""

    identity: str
    devices: tuple[str, ...]
    layers: tuple[int, ...]
    kv_type: str
    ms_per_token: float
    tokens: int = 0
    predicted_ms_per_token: float = 0.0


class PlanKey(Struct, frozen=True):
    """Plans with equal keys and the same coordinator run a model at the same speed."""

    devices: tuple[str, ...]
    layers: tuple[int, ...]
    kv_type: str


def plan_key(shares: "Iterable[DeviceShare]", kv_type: str, threads: Callable[[str], int]) -> PlanKey:
    """Say what decides the speed of a plan: who holds how many layers, in which order, with how many threads.

    Args:
        shares: Those of the plan.
        kv_type: That of the plan.
        threads: By node id, those of its engines on the CPU; asked with "" for the coordinator's own.
    """
    held = [share for share in shares if share.layers]
    devices = tuple([_device(share, threads) for share in held])
    return PlanKey(devices, tuple([share.layers for share in held]), kv_type)


def _device(share: "DeviceShare", threads: Callable[[str], int]) -> str:
    name = f"{share.node_id}/{share.device_id}" if share.node_id else share.device_id
    return f"{name} x{threads(share.node_id)}" if share.device_id == _CPU else name
