"""What real loads have shown of the memory model, for the next placement of the same model.

Agents report a `MemoryCorrection` for each load that they compared with the engine's log. A layout that was loaded
before, under the same conditions, gets what was logged then. Any other gets the memory model's figures times the
largest factors that any load showed, and never less than without them: an over-estimate of one layout proves nothing
about another. Every margin comes on top. Nodes with equal shapes of a model learn from each other.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce
from operator import itemgetter

from msgspec import Struct
from sollol.correction import UNCORRECTED, Correction, MemoryCorrection, layout_of
from sollol.report import CoordinatorPlan, Decision, Model, ModelShape, NodeStatus

from sollold.placement.load import Load

MOST_FACTOR = 16.0  # beyond it something else is wrong than the memory model
MOST_ADDED_BYTES = 1 << 40

# The shapes of a model that anything is known of, and what.
Learned = tuple[tuple[ModelShape, tuple[MemoryCorrection, ...]], ...]


class Corrections(Struct, frozen=True):
    """For one shape under given conditions. `by_layout` has the layouts that were loaded under just these."""

    usual: Correction = UNCORRECTED
    by_layout: tuple[tuple[str, Correction], ...] = ()

    def of(self, split: Iterable[tuple[str, int]]) -> Correction:
        """The one for a split, given as `layout_of` takes it."""
        if not self.by_layout:
            return self.usual
        layout = layout_of(split)
        return next((correction for known, correction in self.by_layout if known == layout), self.usual)


NOTHING_KNOWN = Corrections()


def learned(nodes: Sequence[NodeStatus], models: Sequence[Model | None]) -> Learned:
    """What the nodes report of their own files of the model, by shape: a file that was copied has another identity."""
    found: dict[int, tuple[ModelShape, dict[MemoryCorrection, None]]] = {}
    for node, model in zip(nodes, models, strict=True):
        memory = node.report.memory
        if memory and model is not None and model.shape is not None:
            identity, shape = model.identity, model.shape
            # By the object: nodes with the same file share it, and hashing a shape takes longer than all the rest.
            for record in [record for record in memory if record.identity == identity]:
                if _is_sane(record.correction):
                    found.setdefault(id(shape), (shape, {}))[1][record] = None
    return tuple((shape, tuple(records)) for shape, records in found.values())


def corrections_for(known: Learned, shape: ModelShape, load: Load) -> Corrections:
    of_shape = tuple(record for other, records in known if other is shape or other == shape for record in records)
    return _corrections(of_shape, load.within(shape)) if of_shape else NOTHING_KNOWN


@lru_cache(maxsize=64)
def _corrections(records: tuple[MemoryCorrection, ...], load: Load) -> Corrections:
    by_layout: dict[str, Correction] = {}
    for record in records:
        if _loaded_as(record, load):
            known = by_layout.get(record.layout, record.correction)
            by_layout[record.layout] = _larger(known, record.correction)
    return Corrections(_usual(records), tuple(sorted(by_layout.items(), key=itemgetter(0))))


def _usual(records: Iterable[MemoryCorrection]) -> Correction:
    return reduce(_larger, (record.correction for record in records), UNCORRECTED)


def _loaded_as(record: MemoryCorrection, load: Load) -> bool:
    return (record.context_per_slot, record.parallel, record.kv_type, record.ubatch) == (
        load.context_per_slot,
        load.parallel,
        load.kv_type,
        load.ubatch,
    )


def correction_in(
    decision: Decision, known: Learned, nodes: Sequence[NodeStatus], models: Sequence[Model | None]
) -> Correction | None:
    """The correction in the figures of a decision, the usual one where it has no plan; None when there is none."""
    plan = decision.plan
    if plan is None:
        correction = _usual(record for _, records in known for record in records)
    else:
        at = [node.report.node_id for node in nodes].index(decision.coordinator)
        model = models[at]
        assert model is not None  # it has the file that the plan is for
        assert model.shape is not None
        corrections = corrections_for(known, model.shape, _load_of(plan))
        correction = corrections.of((share.device_id, share.layers) for share in plan.shares)
    return correction if correction != UNCORRECTED else None


def _load_of(plan: CoordinatorPlan) -> Load:
    return Load(
        context_per_slot=plan.context_per_slot,
        parallel=plan.parallel,
        kv_type=plan.kv_type,
        batch=plan.batch,
        ubatch=plan.ubatch,
    )


def _larger(one: Correction, other: Correction) -> Correction:
    return Correction(
        weights=max(one.weights, other.weights),
        kv=max(one.kv, other.kv),
        compute=max(one.compute, other.compute),
        added_bytes=max(one.added_bytes, other.added_bytes),
    )


def _is_sane(correction: Correction) -> bool:
    """Reports come from other machines; NaN is no figure either."""
    return (
        0.0 <= correction.weights <= MOST_FACTOR
        and 0.0 <= correction.kv <= MOST_FACTOR
        and 0.0 <= correction.compute <= MOST_FACTOR
        and 0 <= correction.added_bytes <= MOST_ADDED_BYTES
    )
