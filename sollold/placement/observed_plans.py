"""Plans over several nodes once what was observed of the model has its say."""

from collections.abc import Sequence

from sollol.report import DeviceShare, NodeStatus, ScorePart

from sollold.placement.fit import generating
from sollold.placement.found import Found
from sollold.placement.job import Job
from sollold.placement.needs import Needs


class ObservedPlans:
    def __init__(self, job: Job, nodes: Sequence[NodeStatus]) -> None:
        self._observed, self._kv_type = job.observed, job.kv_type
        self._nodes = nodes
        reports = [node.report for node in nodes] if job.observed else []
        self._threads = {report.node_id: report.engine.threads for report in reports if report.engine is not None}

    def part(self, coordinator: int, shares: Sequence[DeviceShare], predicted_ms: float) -> list[ScorePart]:
        """What to add to the prediction, if anything; `coordinator` is the node's place in the list."""
        if not self._observed:
            return []
        node_id = self._nodes[coordinator].report.node_id
        # The threads asked for are those of lenders: a coordinator's own CPU holds no layers beside backends.
        threads = self._threads.__getitem__
        return [self._observed.correction(node_id, shares, self._kv_type, threads, predicted_ms)]

    def cost_ms(self, found: Found, needs: Needs) -> float:
        """What a plan takes per token that the memory model has not seen yet."""
        if not self._observed:
            return found.cost_ms
        predicted_ms, stop, shares = found.cost_ms, needs.every, []
        for unit, layers in found.path:
            others = generating(self._nodes[unit.at].report)
            predicted_ms -= (needs.read[stop] - needs.read[stop - layers]) * unit.byte_ms * others / (1 + others)
            stop -= layers
            node_id = unit.node_id if unit.lent else ""
            shares.append(DeviceShare(device_id=unit.device.device_id, layers=layers, node_id=node_id))
        (part,) = self.part(found.origin.at, shares[::-1], predicted_ms)
        return found.cost_ms + part.value
