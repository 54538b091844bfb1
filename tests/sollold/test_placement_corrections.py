"""What loads have shown of the memory model counts in the next placement of the same model, on every node."""

from math import inf, nan

import pytest
from msgspec.structs import replace
from sollol.correction import Correction, MemoryCorrection, layout_of
from sollol.memory import CPU_MARGIN_BYTES, device_shares
from sollol.report import CoordinatorPlan, Decision, DeviceKind, DeviceShare, NodeStatus

from sollold.placement import PlacementDefaults, decide
from sollold.placement.explain import as_json, explain
from tests.placement_cases import GIB, cpu, gpu, model, node, shape
from tests.random_clusters import wish, with_rpc

DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=1024)
MORE = Correction(weights=1.2, kv=1.1, compute=1.5, added_bytes=GIB // 8)
LESS = Correction(weights=0.9, kv=0.5, compute=0.8, added_bytes=1000)


def record(correction: Correction, layout: str = "CPU:9", *, identity: str = "same", **load) -> MemoryCorrection:
    conditions = {"context_per_slot": 1024, "parallel": 1, "kv_type": "f16", "ubatch": 512} | load
    return MemoryCorrection(identity=identity, layout=layout, correction=correction, **conditions)


def knows(status: NodeStatus, *records: MemoryCorrection) -> NodeStatus:
    return replace(status, report=replace(status.report, memory=records))


def placed(*nodes: NodeStatus, policy: str = "fit", defaults: PlacementDefaults = DEFAULTS, **wishes) -> Decision:
    return decide(wish(policy=policy, **wishes), nodes, defaults)


def plan(*nodes: NodeStatus, **more) -> CoordinatorPlan:
    found = placed(*nodes, **more).plan
    assert found is not None
    return found


def logged(share: DeviceShare, by: Correction) -> float:
    """What an engine logs for which the memory model's figures need just this correction."""
    return share.weight_bytes * by.weights + share.kv_bytes * by.kv + share.compute_bytes * by.compute + by.added_bytes


def split(*records: MemoryCorrection, free: int = 7 * GIB) -> tuple[NodeStatus, NodeStatus]:
    """Two nodes that hold the model together; the coordinator's remembers these."""
    return (
        knows(with_rpc(node("a", cpu(free=free))), *records),
        with_rpc(node("b", cpu(free=free), models=())),
    )


LAYOUTS = {
    "on the CPU": lambda *records: (knows(node("a"), *records),),
    "beside a GPU": lambda *records: (knows(node("a", cpu(), gpu(free=6 * GIB)), *records),),
    "on two GPUs": lambda *records: (
        knows(node("a", cpu(), gpu("CUDA0", free=6 * GIB), gpu("CUDA1", free=7 * GIB)), *records),
    ),
    "on two nodes": split,
}


@pytest.fixture(params=LAYOUTS)
def nodes(request):
    return LAYOUTS[request.param]


def layout(of: CoordinatorPlan) -> str:
    return layout_of((share.device_id, share.layers) for share in of.shares)


def by_the_memory_model_alone(of: CoordinatorPlan) -> tuple[DeviceShare, ...]:
    kinds = [DeviceKind.CPU if share.device_id == "CPU" else DeviceKind.GPU for share in of.shares]
    return device_shares(
        shape(),
        [(share.device_id, kind, share.layers) for share, kind in zip(of.shares, kinds, strict=True)],
        context_per_slot=of.context_per_slot,
        parallel=of.parallel,
        kv_type=of.kv_type,
        ubatch=of.ubatch,
    )


@pytest.mark.parametrize("where", ["CPU:9", "CPU:0 CPU:4 CPU:5", "CPU:0 GPU:9"])
def test_an_under_estimate_is_corrected_on_every_device_of_whatever_layout_comes_next(nodes, where):
    corrected = plan(*nodes(record(MORE, where, context_per_slot=8192)))

    for plain, share in zip(by_the_memory_model_alone(corrected), corrected.shares, strict=True):
        assert share.total_bytes >= logged(plain, MORE) + CPU_MARGIN_BYTES
        assert share.weight_bytes + share.kv_bytes + share.compute_bytes <= logged(plain, MORE) - MORE.added_bytes + 3


def test_the_same_load_asks_for_what_was_logged_and_the_margin(nodes):
    before = plan(*nodes())
    for by in (MORE, LESS):
        after = plan(*nodes(record(by, layout(before))))
        if layout(after) != layout(before):  # it does not fit there any more
            assert by is MORE
            continue
        for plain, share in zip(before.shares, after.shares, strict=True):
            if not plain.total_bytes:
                continue
            assert share.total_bytes >= logged(plain, by) + CPU_MARGIN_BYTES
            assert share.weight_bytes + share.kv_bytes + share.compute_bytes <= logged(plain, by) + 3


def test_an_over_estimate_of_one_layout_or_load_lowers_no_other():
    alone = node("a", cpu(), gpu(free=6 * GIB))
    before = plan(alone)
    elsewhere = (
        record(LESS, "CPU:9"),
        record(LESS, layout(before), parallel=2),
        record(LESS, layout(before), kv_type="q8_0"),
    )

    after = plan(knows(alone, *elsewhere))

    for plain, share in zip(before.shares, after.shares, strict=True):
        sizes = (plain.weight_bytes, plain.kv_bytes, plain.compute_bytes)
        assert (share.weight_bytes, share.kv_bytes, share.compute_bytes) == sizes
        assert share.margin_bytes == plain.margin_bytes + LESS.added_bytes


def test_of_several_loads_the_largest_factors_count():
    both = plan(knows(node("a"), record(Correction(weights=1.1, kv=1.3)), record(MORE, "GPU:9", parallel=4)))

    one = plan(knows(node("a"), record(Correction(weights=1.2, kv=1.3, compute=1.5, added_bytes=GIB // 8), "x")))
    # The first was loaded just so: what it showed is exact, and the other says nothing against it.
    assert both.shares[0].weight_bytes < one.shares[0].weight_bytes
    other = plan(knows(node("a"), record(Correction(weights=1.1, kv=1.3), "y"), record(MORE, "GPU:9", parallel=4)))
    assert other == one


def test_a_context_beyond_what_the_model_was_trained_for_is_the_same_load_as_that():
    long = replace(DEFAULTS, context_per_slot=1 << 20)
    known = knows(node("a"), record(LESS, context_per_slot=8192))

    assert plan(known, defaults=long).shares[0].weight_bytes < plan(node("a"), defaults=long).shares[0].weight_bytes


def test_nodes_learn_from_each_other_though_their_files_have_other_times():
    copy = replace(model(), identity="the same bytes, copied later")
    other = knows(node("b", cpu(free=GIB), models=(copy,)), record(MORE, identity=copy.identity))

    assert plan(node("a"), other).shares[0].weight_bytes > plan(node("a")).shares[0].weight_bytes


def test_another_model_of_the_same_name_or_of_the_same_node_teaches_nothing():
    namesake = replace(model(of=shape(layers=20)), identity="another")
    other = knows(node("b", cpu(free=GIB), models=(namesake,)), record(MORE, identity="another"))
    unknown = knows(node("c", cpu(free=GIB), models=()), record(MORE, identity="long gone"))

    assert plan(node("a"), other, unknown) == plan(node("a"))


@pytest.mark.parametrize(
    "nonsense",
    [Correction(weights=nan), Correction(kv=inf), Correction(compute=-1.0), Correction(weights=17.0), Correction(added_bytes=1 << 41)],
)  # fmt: skip
def test_a_correction_that_cannot_be_true_is_left_out(nonsense):
    decision = placed(knows(node("a"), record(nonsense)))

    assert decision.plan == plan(node("a"))
    assert decision.correction is None


def test_a_correction_counts_at_once_and_is_forgotten_with_the_report_that_had_it():
    plain = plan(node("a"))

    assert plan(knows(node("a"), record(MORE))) != plain
    assert plan(node("a")) == plain


def test_classic_reserves_by_the_corrected_figures_too():
    plain = plan(node("a"), policy="classic")

    corrected = plan(knows(node("a"), record(MORE)), policy="classic")

    assert corrected.shares[0].total_bytes >= logged(plain.shares[0], MORE) + CPU_MARGIN_BYTES


def test_a_model_that_fits_only_by_an_under_estimate_is_not_placed_there_again():
    tight = node("a", cpu(free=plan(node("a")).shares[0].total_bytes))
    assert placed(tight).refusal is None

    decision = placed(knows(tight, record(MORE)))

    assert decision.refusal is not None
    assert decision.nodes[0].needed_bytes > decision.nodes[0].free_bytes
    assert decision.correction == MORE
    assert "corrected by what earlier loads logged" in explain(decision)


def test_one_that_does_not_fit_only_by_an_over_estimate_is():
    needed = plan(node("a")).shares[0].total_bytes
    tight = node("a", cpu(free=needed - GIB // 4))
    assert placed(tight).refusal is not None

    assert placed(knows(tight, record(LESS))).refusal is None


def test_the_record_says_by_how_much_and_nothing_where_nothing_was_corrected():
    decision = placed(knows(node("a"), record(MORE)))

    assert decision.correction == MORE
    assert as_json(decision)["correction"] == {"weights": 1.2, "kv": 1.1, "compute": 1.5, "added_bytes": GIB // 8}
    text = "Memory corrected by what earlier loads logged: weights x 1.200, KV x 1.100, compute x 1.500"
    assert f"{text}, and 128.00 MiB more on each device" in explain(decision)
    for nothing in (placed(node("a")), placed(knows(node("a"), record(Correction())))):
        assert nothing.correction is None
        assert "corrected" not in explain(nothing)


def test_what_the_nodes_say_counts_in_any_order():
    a, b, c = (
        knows(node(name), record(by, name)) for name, by in (("a", MORE), ("b", LESS), ("c", Correction(kv=3.0)))
    )

    assert decide(wish(), [a, b, c], DEFAULTS) == decide(wish(), [c, a, b], DEFAULTS)
