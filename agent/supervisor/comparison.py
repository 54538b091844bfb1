"""The memory that a plan predicts for each device beside what the engine's log says of it. Pure.

The log counts a mapped part of the model's file as a span that may hold tensors of other devices too, and weights that
were copied into another order twice. Such a size is a bound and not a figure: a prediction within the bounds is right.
"""

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace
from sollol.correction import UNCORRECTED, Correction, scaled
from sollol.report import CoordinatorPlan, DeviceShare

from agent.supervisor.buffers import HOST, MIB, Buffers, lent_device

ROUNDING = MIB // 100 + 1  # of two lines of the log, which is as many as a figure usually has


class Sizes(Struct, frozen=True, kw_only=True):
    """Bytes on one device, by the kinds of the memory model."""

    least_weights: int
    most_weights: int
    kv: int
    compute: int

    def weights(self, predicted: int) -> int:
        return min(max(predicted, self.least_weights), self.most_weights)

    def total(self, predicted: DeviceShare) -> int:
        return self.weights(predicted.weight_bytes) + self.kv + self.compute


def logged_sizes(plan: CoordinatorPlan, found: Mapping[str, Buffers], node_id: str) -> tuple[Sizes | None, ...]:
    """What the log says of each share of the plan, None of one that holds nothing; empty when a line is missing.

    `node_id`: our own, where shares without a node are.
    """
    names = _names(plan, node_id)
    alone = len([name for name in names if name is not None]) == 1
    logged: list[Sizes | None] = []
    for name in names:
        buffers = found.get(name) if name is not None else None
        if name is not None and (buffers is None or not buffers.compute):
            return ()
        logged.append(None if buffers is None else _sizes(buffers, alone=alone))
    return tuple(logged)


def with_logged(shares: Iterable[DeviceShare], logged: Iterable[Sizes | None]) -> tuple[DeviceShare, ...]:
    return tuple(
        share if sizes is None else replace(share, logged_bytes=sizes.total(share))
        for share, sizes in zip(shares, logged, strict=True)
    )


def correction_between(predicted: Sequence[DeviceShare], logged: Sequence[Sizes | None]) -> Correction:
    """What makes no figure of the prediction smaller than the log's; 1 where the log's rounding explains the rest.

    Args:
        predicted: The memory model's own figures, corrected by nothing.
        logged: As of `logged_sizes`, for the same shares.
    """
    pairs = [(share, sizes) for share, sizes in zip(predicted, logged, strict=True) if sizes is not None]
    rounding = ROUNDING * len(pairs)
    weights = _factor(((share.weight_bytes, sizes.weights(share.weight_bytes)) for share, sizes in pairs), rounding)
    kv = _factor(((share.kv_bytes, sizes.kv) for share, sizes in pairs), rounding)
    compute = _factor(((share.compute_bytes, sizes.compute) for share, sizes in pairs), rounding)
    short = max(
        (
            sizes.total(share)
            - scaled(share.weight_bytes, weights)
            - scaled(share.kv_bytes, kv)
            - scaled(share.compute_bytes, compute)
            for share, sizes in pairs
        ),
        default=0,
    )
    if (weights, kv, compute) == (1.0, 1.0, 1.0) and short <= 3 * ROUNDING:
        return UNCORRECTED
    return Correction(weights=weights, kv=kv, compute=compute, added_bytes=max(0, short))


def _names(plan: CoordinatorPlan, node_id: str) -> list[str | None]:
    """By share, how `logged_buffers` names its device; None of one that holds nothing."""
    lent = {
        (backend.node_id or node_id, device_id): lent_device(f"{backend.host}:{backend.port}", number)
        for backend in plan.backends
        for number, device_id in enumerate(backend.device_ids)
    }
    return [_name(share, at, lent) for at, share in enumerate(plan.shares)]


def _name(share: DeviceShare, at: int, lent: Mapping[tuple[str, str], str]) -> str | None:
    if at == 0:
        return HOST
    if not share.layers:
        return None
    return lent.get((share.node_id, share.device_id)) if share.node_id else share.device_id


def _sizes(buffers: Buffers, *, alone: bool) -> Sizes:
    most = buffers.model + buffers.mapped
    is_bound = buffers.mapped and (buffers.model or not alone)
    return Sizes(
        least_weights=buffers.model if is_bound else most,
        most_weights=most,
        kv=buffers.kv,
        compute=buffers.compute + buffers.output,
    )


def _factor(pairs: Iterable[tuple[int, int]], rounding: int) -> float:
    predicted = logged = 0
    for one, other in pairs:
        predicted += one
        logged += other
    if not predicted or abs(logged - predicted) <= rounding:
        return 1.0
    return logged / predicted
