"""What the head can offer: the models of all live nodes, merged by name."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec.structs import replace
from sollol.errors import Reason, refuse
from sollol.inference import AvailableModel
from sollol.names import check_model_name, closest, quoted
from sollol.report import InstanceState, Model, NodeStatus

NO_NODES_RETRY_AFTER_S = 2.0  # what an agent takes to start and be seen


class ClusterView(Protocol):
    @property
    def models_version(self) -> int:
        """Another number whenever a node comes or goes, or has other models than before."""

    def statuses(self) -> tuple[NodeStatus, ...]: ...
    def any_live(self, stale_after_s: float) -> bool: ...
    def all_heard(self) -> bool:
        """False for a moment after the head's start, while an agent that it dials may have what nobody else has."""


class Catalogue:
    """Read-only view of the nodes' models. See `sollold.streams.Catalogue`.

    Names are looked up per request, so they are gathered once per change of any node's models, not per request.
    """

    def __init__(self, nodes: ClusterView, *, stale_after_s: float) -> None:
        self._nodes = nodes
        self._stale_after_s = stale_after_s
        self._names: dict[str, str] = {}
        self._names_version = -1
        self._merged: tuple[AvailableModel, ...] = ()
        self._merged_of: tuple[int, tuple[str, ...]] | None = None

    def ready(self) -> bool:
        return self._nodes.any_live(self._stale_after_s)

    def models(self) -> tuple[AvailableModel, ...]:
        """Every model of every live node, ordered by name; a broken copy only counts when there is no good one."""
        statuses = self._nodes.statuses()
        live = [status for status in statuses if status.connected or status.report_age_s <= self._stale_after_s]
        merged_of = (self._nodes.models_version, tuple(status.report.node_id for status in live))
        if merged_of != self._merged_of:
            self._merged = _merged(live)
            self._merged_of = merged_of
        warm = _warm(live)
        return tuple(replace(model, warm=True) if model.name in warm else model for model in self._merged)

    def known(self, name: str) -> str | None:
        """The model's own name for a name or alias; None when no node has it.

        What a pool serves keeps its names when its file is gone, or not found yet by an agent that has just started.
        """
        if self._names_version != self._nodes.models_version:
            statuses = self._nodes.statuses()
            warm = _warm(statuses)
            served = {known_as: own for known_as, own in self._names.items() if own in warm}
            self._names = served | _names(statuses)
            self._names_version = self._nodes.models_version
        return self._names.get(name)

    def sought(self, name: str) -> str | None:
        """Like `known`, for who asks for it now: also a model that is only known by a pool that serves it.

        Raises:
            SollolError: NO_NODES while somebody may have it who has not been heard.
        """
        found = self.known(name)
        if found is not None or name in _warm(self._nodes.statuses()):
            return found or name
        if not self.ready():
            why = f"no live node, so nobody knows {quoted(name)}: start `sollol-agent` on one"
        elif not self._nodes.all_heard():
            why = f"this head has just started, and a node that it has not heard yet may have {quoted(name)}: ask again"
        else:
            return None
        raise refuse(Reason.NO_NODES, why, retryable=True, retry_after_s=NO_NODES_RETRY_AFTER_S)

    def canonical(self, name: str) -> str:
        """The model's own name for a name or alias.

        Raises:
            SollolError: INVALID_MODEL_NAME; NO_NODES, as `sought`; else MODEL_NOT_FOUND naming the closest names.
        """
        check_model_name(name)
        found = self.sought(name)
        if found is not None:
            return found
        near = closest(name, self._names)
        hint = f"; did you mean {', '.join(near)}?" if near else "; `sollol models` lists what there is"
        raise refuse(Reason.MODEL_NOT_FOUND, f"no node has a model named {name}{hint}")


def _names(statuses: Iterable[NodeStatus]) -> dict[str, str]:
    """Every name and alias, and the name it stands for; a name wins over any alias, the first alias over later ones."""
    models = [model for status in statuses for model in status.report.models]
    found = {model.name: model.name for model in models}
    for model in models:
        for alias in model.aliases:
            found.setdefault(alias, model.name)
    return found


def _merged(live: Iterable[NodeStatus]) -> tuple[AvailableModel, ...]:
    copies: dict[str, list[tuple[str, Model]]] = {}
    for status in live:
        for model in status.report.models:
            copies.setdefault(model.name, []).append((status.report.node_id, model))
    return tuple(_available(copies[name]) for name in sorted(copies))


def _available(copies: Sequence[tuple[str, Model]]) -> AvailableModel:
    usable = [copy for copy in copies if copy[1].problem is None] or copies
    model = usable[0][1]
    shape = model.shape
    return AvailableModel(
        name=model.name,
        size_bytes=model.size_bytes,
        node_ids=tuple(node_id for node_id, _ in usable),
        architecture=shape.architecture if shape else "",
        quantization=model.quantization,
        context_length=shape.context_length if shape else 0,
        aliases=model.aliases,
        problem=model.problem,
    )


def _warm(live: Iterable[NodeStatus]) -> set[str]:
    return {
        instance.model
        for status in live
        if status.connected
        for instance in status.report.instances
        if instance.state is InstanceState.READY
    }
