"""What the head can offer: the models of all live nodes, merged by name."""

from typing import Protocol

from sollol.errors import Reason, refuse
from sollol.inference import AvailableModel
from sollol.names import check_model_name, closest
from sollol.report import InstanceState, Model, NodeStatus


class ClusterView(Protocol):
    def statuses(self) -> tuple[NodeStatus, ...]: ...


class Catalogue:
    """Read-only view of the nodes' models. See `sollold.streams.Catalogue`."""

    def __init__(self, nodes: ClusterView, *, stale_after_s: float) -> None:
        self._nodes = nodes
        self._stale_after_s = stale_after_s

    def ready(self) -> bool:
        return any(self._live(status) for status in self._nodes.statuses())

    def models(self) -> tuple[AvailableModel, ...]:
        """Every model of every live node, ordered by name; a broken copy only counts when there is no good one."""
        merged: dict[str, AvailableModel] = {}
        warm = self._warm()
        for status in self._nodes.statuses():
            if not self._live(status):
                continue
            for model in status.report.models:
                known = merged.get(model.name)
                here = (status.report.node_id,)
                if known is None or (known.problem is not None and model.problem is None):
                    merged[model.name] = _available(model, here, warm=model.name in warm)
                elif model.problem is None or known.problem is not None:
                    merged[model.name] = _available(model, known.node_ids + here, warm=model.name in warm)
        return tuple(merged[name] for name in sorted(merged))

    def canonical(self, name: str) -> str:
        """The model's own name for a name or alias.

        Raises:
            SollolError: INVALID_MODEL_NAME, or MODEL_NOT_FOUND naming the closest names.
        """
        check_model_name(name)
        known: set[str] = set()
        aliased: str | None = None
        for status in self._nodes.statuses():
            for model in status.report.models:
                if model.name == name:
                    return name
                if name in model.aliases and aliased is None:
                    aliased = model.name
                known.update((model.name, *model.aliases))
        if aliased is not None:
            return aliased
        near = closest(name, known)
        hint = f"; did you mean {', '.join(near)}?" if near else "; `sollol models` lists what there is"
        raise refuse(Reason.MODEL_NOT_FOUND, f"no node has a model named {name}{hint}")

    def _live(self, status: NodeStatus) -> bool:
        return status.connected or status.report_age_s <= self._stale_after_s

    def _warm(self) -> set[str]:
        return {
            instance.model
            for status in self._nodes.statuses()
            if status.connected
            for instance in status.report.instances
            if instance.state is InstanceState.READY
        }


def _available(model: Model, node_ids: tuple[str, ...], *, warm: bool) -> AvailableModel:
    shape = model.shape
    return AvailableModel(
        name=model.name,
        size_bytes=model.size_bytes,
        node_ids=node_ids,
        warm=warm,
        architecture=shape.architecture if shape else "",
        quantization=model.quantization,
        context_length=shape.context_length if shape else 0,
        aliases=model.aliases,
        problem=model.problem,
    )
