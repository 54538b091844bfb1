"""One model over several nodes."""

from dataclasses import dataclass, field
from math import isclose

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, Retry, SollolError
from sollol.memory import CPU_MARGIN_BYTES
from sollol.report import Decision, DeviceShare, Instance, InstanceState, NodeStatus, ScorePart

from sollold.placement import PlacementDefaults, decide
from sollold.placement.explain import as_json, explain
from sollold.placement.links import Link
from tests.cpu import cost
from tests.placement_cases import GIB, cpu, gpu, model, node, shape
from tests.random_clusters import OTHERS, RPC, reporting, wish, with_rpc

DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=1024)
OUTPUT_ROOM = 3 * GIB // 2  # for half a GiB of output layer, its buffers and the margin


@dataclass
class Case:
    """8 layers of 1 GiB, half a GiB of embeddings and of output; the file is on `a` only."""

    nodes: list[NodeStatus] = field(default_factory=list)

    def add(self, node_id: str, *devices, file: bool = False, **more) -> "Case":
        status = node(node_id, *devices, models=(model(),) if file else (), **more)
        self.nodes.append(with_rpc(status))
        return self

    def link(self, one: str, other: str, **figures: float) -> "Case":
        known = {(one, other): Link(**figures)}
        self.nodes = [reporting(each, known) for each in self.nodes]
        return self

    def decide(self, defaults: PlacementDefaults = DEFAULTS, **wishes) -> Decision:
        return decide(wish(**wishes), self.nodes, defaults)


def held(decision: Decision) -> list[tuple[str, str, int]]:
    return [(share.node_id, share.device_id, share.layers) for share in decision.plan.shares]


def ranges(shares: tuple[DeviceShare, ...]) -> list[tuple[int | None, int | None]]:
    return [(share.first_layer, share.last_layer) for share in shares]


def two_halves() -> Case:
    return Case().add("a", cpu(free=6 * GIB), file=True).add("b", cpu(free=6 * GIB))


def test_a_model_too_large_for_any_node_is_dealt_out_and_its_own_cpu_becomes_a_backend():
    decision = two_halves().decide()

    assert decision.coordinator == "a"
    assert held(decision) == [("", "CPU", 0), ("b", "CPU", 4), ("a", "CPU", 5)]
    assert ranges(decision.plan.shares) == [(None, None), (0, 3), (4, 7)]
    assert decision.plan.backends == ()


def test_the_record_names_the_lender_and_why_it_is_no_coordinator():
    a, b = two_halves().decide().nodes

    assert (a.best, a.refusal, len(a.shares)) == (True, None, 2)
    assert (b.best, b.score, b.refusal.reason) == (False, None, Reason.MODEL_ABSENT)
    assert [share.layers for share in b.shares] == [4]
    assert b.needed_bytes == b.shares[0].total_bytes


def test_the_explanation_shows_layers_bytes_and_milliseconds_by_node_and_device():
    text = explain(two_halves().decide())

    assert "lends 4 layers: 0-3" in text
    assert "4-7 + output" in text
    assert "Per token: " in text
    assert f"{4 * GIB:,}" in text


def test_programs_get_the_shares_of_each_node():
    record = as_json(two_halves().decide())

    assert [len(each["shares"]) for each in record["nodes"]] == [2, 1]
    assert record["reduced_context_from"] is None


def test_the_score_is_reads_and_hops_and_the_turns_of_other_pools():
    busy = Instance(instance_id="x", model="other", state=InstanceState.READY, active_streams=2)
    case = two_halves()
    case.add("c", cpu(free=1 * GIB))
    case.nodes[1] = replace(case.nodes[1], report=replace(case.nodes[1].report, instances=(busy,)))
    decision = case.link("b", "a", rtt_s=0.002, bytes_per_s=1e8).decide()

    (best,) = (verdict for verdict in decision.nodes if verdict.best)
    share = {part.name: part.value for part in best.parts}
    assert held(decision)[1:] == [("b", "CPU", 4), ("a", "CPU", 5)]
    assert isclose(share["read_ms.b/CPU"], 4 * GIB / 20e9 * 1000)
    assert isclose(share["read_ms.a/CPU"], 4.5 * GIB / 20e9 * 1000)
    assert isclose(share["hop_ms.b"], 3 + 2 * 1024 * 4 / 1e8 * 1000)
    assert isclose(share["hop_ms.a"], 1.05 + (2 * 1024 * 4 + 32000 * 4) / 2e9 * 1000)
    assert isclose(share["busy_ms"], share["read_ms.b/CPU"])


def test_a_node_that_holds_it_all_is_not_split_for_less_than_5_percent():
    case = Case().add("a", cpu(free=12 * GIB), file=True).add("b", cpu(free=12 * GIB, bandwidth=20.5e9))

    assert held(case.decide()) == [("", "CPU", 9)]


def test_two_gpus_on_two_nodes_beat_the_slow_memory_of_one():
    case = Case().add("a", cpu(free=32 * GIB), gpu(free=7 * GIB), file=True).add("b", cpu(), gpu(free=6 * GIB))

    decision = case.decide()

    assert held(decision) == [("", "CPU", 0), ("b", "CUDA0", 3), ("", "CUDA0", 6)]
    assert ScorePart("busy_ms", 0.0) in decision.nodes[0].parts


def test_of_plans_that_are_equally_fast_the_one_with_fewer_nodes_is_taken():
    case = Case().add("a", cpu(free=1 * GIB), file=True)
    case.add("b", cpu(free=6 * GIB, bandwidth=21e9)).add("c", cpu(free=6 * GIB, bandwidth=21e9))
    case.add("d", cpu(free=12 * GIB, bandwidth=20.4e9))

    assert held(case.decide()) == [("", "CPU", 0), ("d", "CPU", 9)]


def test_a_slow_node_is_left_out_where_the_rest_can_do_without():
    case = two_halves().add("c", cpu(free=6 * GIB, bandwidth=2e9)).add("d", cpu(free=6 * GIB, bandwidth=40e9))

    assert {node_id for node_id, _, _ in held(case.decide())} <= {"", "a", "d"}


def test_a_far_node_is_left_out_for_a_near_one():
    case = two_halves().add("c", cpu(free=6 * GIB)).link("a", "b", rtt_s=0.2, bytes_per_s=1e6)

    assert ("c", "CPU", 4) in held(case.decide())


def test_a_coordinator_may_hold_no_layer_at_all():
    case = Case().add("a", cpu(free=1 * GIB), file=True).add("b", cpu(free=12 * GIB))

    assert held(case.decide()) == [("", "CPU", 0), ("b", "CPU", 9)]


def test_the_last_share_is_with_the_coordinator_where_that_saves_the_way_of_the_answer():
    case = two_halves().link("a", "b", rtt_s=0.0005, bytes_per_s=1e6)

    assert held(case.decide())[-1][0] == "a"


@pytest.mark.parametrize("engine", OTHERS)
def test_only_engines_of_the_same_build_and_protocol_lend(engine):
    case = two_halves()
    case.nodes[1] = with_rpc(case.nodes[1], engine)

    assert case.decide().refusal.reason is Reason.NO_FIT


@pytest.mark.parametrize("more", [{"cordoned": True}, {"age_s": 60.0}], ids=["cordoned", "stale"])
def test_a_node_that_takes_no_model_lends_nothing(more):
    case = Case().add("a", cpu(free=6 * GIB), file=True).add("b", cpu(free=6 * GIB), **more)

    assert case.decide().refusal.reason is Reason.NO_FIT


def test_required_labels_are_those_of_every_node_and_other_wishes_those_of_the_coordinator():
    case = Case().add("a", cpu(free=6 * GIB), file=True, labels={"lan": "1"}, cpu_count=16)
    case.add("b", cpu(free=6 * GIB)).add("c", cpu(free=6 * GIB), labels={"lan": "1"}, cpu_count=2)

    decision = case.decide(require=("lan",), min_cpus=8, pinned_node="a")

    assert ("c", "CPU", 4) in held(decision)


def test_unified_memory_is_counted_once():
    case = Case().add("a", cpu(free=6 * GIB), file=True)
    case.add("b", cpu(free=4 * GIB), gpu(free=4 * GIB, bandwidth=0.0, unified=True))

    assert case.decide().refusal.reason is Reason.NO_FIT


def test_a_gpu_is_lent_only_where_its_node_has_memory_for_the_process():
    case = Case().add("a", cpu(free=6 * GIB), file=True).add("b", cpu(free=100_000_000), gpu(free=24 * GIB))

    assert case.decide().refusal.reason is Reason.NO_FIT


def test_only_a_lent_gpu_takes_of_its_nodes_ram_beside():
    case = Case().add("a", cpu(free=32 * GIB), gpu(free=7 * GIB), file=True).add("b", cpu(), gpu(free=6 * GIB))

    coordinator, lent, own = case.decide().plan.shares

    assert (coordinator.host_bytes, own.host_bytes) == (0, 0)
    assert lent.host_bytes > CPU_MARGIN_BYTES + GIB // 2  # the process, and the largest tensor of a layer


def test_what_a_lent_gpu_takes_of_ram_is_not_lent_by_its_cpu():
    """Four layers take 4.8 GiB of the CPU: they fit into 5, but for what the GPU beside takes of them."""
    for ram, holding in ((5, []), (6, [("", "CPU", 0), ("b", "CPU", 4), ("b", "CUDA0", 1), ("a", "CPU", 4)])):
        case = Case().add("a", cpu(free=5 * GIB), file=True).add("b", cpu(free=ram * GIB), gpu(free=2 * GIB))
        decision = case.decide()
        assert (held(decision) if decision.plan else []) == holding


def test_max_nodes_and_backends_per_pool_bind():
    case = Case().add("a", cpu(free=14 * GIB), file=True)
    for name in "bcd":
        case.add(name, cpu(free=4 * GIB))

    assert held(case.decide(backends_per_pool=0)) == [("", "CPU", 9)]
    for backends in (1, 2, 3):
        assert len(case.decide(backends_per_pool=backends).plan.shares) == backends + 1
    case.nodes[0] = with_rpc(node("a", cpu(free=4 * GIB), models=(model(),)))
    assert case.decide(max_nodes=2).refusal.reason is Reason.NO_FIT
    assert case.decide(max_nodes=4).plan is not None


@pytest.mark.parametrize(
    "wrong",
    [{"max_nodes": 0}, {"max_nodes": 17}, {"backends_per_pool": 16}, {"backends_per_pool": 3, "max_nodes": 2}],
)
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(SollolError, match="INVALID_REQUEST"):
        two_halves().decide(**wrong)


def test_more_backends_than_nodes_that_can_lend_are_refused_with_both_numbers():
    case = two_halves().add("c", cpu(), engine=False)
    case.nodes[2] = replace(case.nodes[2], report=replace(case.nodes[2].report, engine=None))
    few, many = case.decide(backends_per_pool=3).refusal, case.decide(backends_per_pool=9).refusal

    assert few.reason is many.reason is Reason.NO_FIT
    assert "3 backends are asked for, and 2 of 3 nodes can lend" in few.message
    assert few.numbers == {"nodes": 3, "needed_backends": 3, "usable_nodes": 2}
    assert (few.retry, many.retry) == (Retry.RETRYABLE, Retry.FATAL)


def test_backends_that_could_be_but_hold_nothing_are_said_to_be_the_reason():
    case = Case().add("a", cpu(free=14 * GIB), file=True).add("b", cpu(free=GIB // 8))
    refusal = case.decide(backends_per_pool=2).refusal

    assert refusal.reason is Reason.NO_FIT
    assert "not with exactly 2 backends" in refusal.message


def test_what_fits_nowhere_is_refused_with_what_the_nodes_have_together():
    case = Case().add("a", cpu(free=3 * GIB), file=True).add("b", cpu(free=2 * GIB)).add("c", cpu(free=GIB))
    refusal = case.decide().refusal

    assert refusal.reason is Reason.NO_FIT
    assert refusal.numbers["usable_nodes"] == 3
    assert refusal.numbers["free_together_bytes"] == 6 * GIB
    assert (
        f"3 nodes together have {6 * GIB:,} bytes free of {refusal.numbers['needed_bytes']:,} needed" in refusal.message
    )


@pytest.mark.parametrize(
    ("total", "wishes", "retry"),
    [
        (6 * GIB, {}, Retry.RETRYABLE),
        (4 * GIB, {}, Retry.FATAL),
        (6 * GIB, {"max_nodes": 1}, Retry.FATAL),
    ],
)
def test_what_several_nodes_could_hold_if_nothing_else_ran_there_is_worth_asking_for_again(total, wishes, retry):
    busy = cpu(free=GIB, total=total)
    refusal = Case().add("a", busy, file=True).add("b", busy).decide(**wishes).refusal

    assert refusal.reason is Reason.NO_FIT
    assert refusal.retry is retry


def test_a_cap_smaller_than_one_layer_lends_nothing():
    assert (
        Case().add("a", cpu(free=6 * GIB), file=True).add("b", cpu(free=GIB)).decide().refusal.reason is Reason.NO_FIT
    )


def test_context_is_reduced_where_the_user_allows_it_and_the_record_says_so():
    case = two_halves()
    long = replace(DEFAULTS, context_per_slot=8192, parallel=64)

    assert case.decide(long).refusal.reason is Reason.NO_FIT
    decision = case.decide(long, allow_reduced_context=True)
    assert decision.reduced_context_from == 8192
    assert decision.plan.context_per_slot % 256 == 0
    assert f"Context reduced from 8192 to {decision.plan.context_per_slot} tokens" in explain(decision)


def test_more_devices_than_the_engine_takes_are_not_planned():
    case = Case().add("a", cpu(free=1 * GIB), file=True)
    for number in range(20):
        case.add(f"b{number:02}", cpu(free=OUTPUT_ROOM))
    case.nodes[0] = with_rpc(node("a", cpu(free=1 * GIB), models=(model(of=shape(16)),)))

    assert case.decide().refusal.reason is Reason.NO_FIT


def test_a_decision_over_sixteen_unequal_nodes_is_quick():
    """The budget of 20 ms is watched by tests/bench; here only that nothing explodes."""
    large = model(of=shape(80, layer_bytes=GIB // 2))
    nodes = [
        with_rpc(node(f"n{at:02}", cpu(free=(3 + at) * GIB, bandwidth=(10 + at) * 1e9), models=(large,)))
        for at in range(16)
    ]
    decide(wish(), nodes, PlacementDefaults())
    with cost() as one:
        assert decide(wish(), nodes, PlacementDefaults()).plan is not None

    assert one.cpu_s < 0.2


def test_no_search_is_made_for_nodes_that_can_do_it_alone():
    nodes = [with_rpc(node(f"n{at}", cpu(), gpu(free=24 * GIB))) for at in range(1000)]
    alone = [replace(each, report=replace(each.report, engine=replace(RPC, rpc=False))) for each in nodes]

    assert decide(wish(), nodes, DEFAULTS) == decide(wish(), alone, DEFAULTS)
