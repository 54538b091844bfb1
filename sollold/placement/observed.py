"""What was observed of a model's speed, and how it corrects what is predicted for its plans.

A plan that ran before gets what was observed. Any other gets its prediction times a factor, observed over predicted:
that of the newest plan over the same devices, else the median of all plans of the model, or more where a plan over some
of the devices was slower than that. Without a factor whatever never ran would look better than what ran slower than
predicted, and each load would try another plan. What makes a model slower or faster than its bytes say (weights that
are costly to unpack, a cache that holds them) goes with it from plan to plan.
"""

from collections.abc import Callable, Sequence
from statistics import median

from msgspec import Struct
from sollol.report import DeviceShare, Model, NodeStatus, ScorePart
from sollol.speed import PlanKey, SpeedObservation, plan_key

MOST_FACTOR = 4.0  # beyond it, either way, something else is wrong than the prediction
MOST_SPREAD = 2.0  # a search that gave everything a chance would not come to its end
MOST_MS = 1e9


class Observed(Struct, frozen=True, kw_only=True):
    """Of one model: ms per token by coordinator and plan, factors by coordinator and devices."""

    by_plan: dict[tuple[str, PlanKey], float] = {}
    by_devices: dict[tuple[str, frozenset[str]], float] = {}
    factor: float = 1.0
    least_factor: float = 1.0
    most_factor: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.by_plan)

    @property
    def spread(self) -> float:
        """Up to so many times longer may a plan be predicted to take than another, and turn out the faster."""
        return min(self.most_factor / self.least_factor, MOST_SPREAD)

    def correction(
        self,
        coordinator: str,
        shares: Sequence[DeviceShare],
        kv_type: str,
        threads: Callable[[str], int],
        predicted_ms: float,
    ) -> ScorePart:
        """What to add to the prediction of a plan; `threads` as in `plan_key`."""
        key = plan_key(shares, kv_type, threads)
        observed_ms = self.by_plan.get((coordinator, key))
        if observed_ms is not None:
            return ScorePart("observed_ms", observed_ms - predicted_ms)
        return ScorePart("scaled_ms", predicted_ms * (self._factor(coordinator, key) - 1))

    def _factor(self, coordinator: str, key: PlanKey) -> float:
        devices = _qualified(coordinator, key.devices)
        factor = self.by_devices.get((coordinator, devices))
        if factor is not None:
            return factor
        parts = [factor for (_, known), factor in self.by_devices.items() if known <= devices]
        return max([self.factor, *parts])


NOTHING = Observed()


def observed_of(nodes: Sequence[NodeStatus], models: Sequence[Model | None]) -> Observed:
    """What the nodes report of the model, which each of them has as `models` says."""
    found = [
        (node.report.node_id, observation)
        for node, model in zip(nodes, models, strict=True)
        if node.report.speeds and model is not None
        for observation in node.report.speeds
        if observation.identity == model.identity and _is_sane(observation)
    ]
    if not found:
        return NOTHING
    by_devices: dict[tuple[str, frozenset[str]], float] = {}
    for node_id, observation in found:
        if observation.predicted_ms_per_token:
            devices = _qualified(node_id, observation.devices)
            by_devices.setdefault((node_id, devices), _factor(observation))  # the newest comes first
    factors = [_factor(observation) for _, observation in found if observation.predicted_ms_per_token]
    return Observed(
        by_plan={
            (node_id, PlanKey(observation.devices, observation.layers, observation.kv_type)): observation.ms_per_token
            for node_id, observation in found
        },
        by_devices=by_devices,
        factor=median(factors) if factors else 1.0,
        least_factor=min(factors, default=1.0),
        most_factor=max(factors, default=1.0),
    )


def _qualified(coordinator: str, devices: Sequence[str]) -> frozenset[str]:
    """Devices by node too: a node's own CPU is the same one when it is lent."""
    return frozenset(device if "/" in device else f"{coordinator}/{device}" for device in devices)


def _factor(observation: SpeedObservation) -> float:
    factor = observation.ms_per_token / observation.predicted_ms_per_token
    return min(max(factor, 1 / MOST_FACTOR), MOST_FACTOR)


def _is_sane(observation: SpeedObservation) -> bool:
    """Reports come from other machines; NaN is no figure either."""
    return 0.0 < observation.ms_per_token <= MOST_MS and 0.0 <= observation.predicted_ms_per_token <= MOST_MS
