"""Feasible in bytes, best in predicted milliseconds per token."""

import pytest
from sollol.report import Instance, InstanceState, PlacementWish

from sollold.placement import PlacementDefaults, decide
from sollold.placement.explain import explain
from tests.placement_cases import GIB, MODEL, cpu, gpu, model, node, shape


def placed(*nodes, **wish):
    return decide(PlacementWish(model=MODEL, **wish), nodes, PlacementDefaults(parallel=1, context_per_slot=1024))


def layers(decision):
    return {share.device_id: share.layers for share in decision.plan.shares}


def parts(decision, at=0):
    return {part.name: part.value for part in decision.nodes[at].parts}


def test_a_model_that_fits_on_the_gpu_goes_there_whole():
    decision = placed(node("a", cpu(), gpu()))

    assert layers(decision) == {"CPU": 0, "CUDA0": 9}
    assert parts(decision)["read_ms.CPU"] == 0
    assert pytest.approx(parts(decision)["read_ms.CUDA0"]) == (8 * GIB + GIB // 2) / 400e9 * 1000


def test_what_does_not_fit_on_the_gpu_stays_in_front_on_the_cpu():
    decision = placed(node("a", cpu(), gpu(free=5 * GIB)))

    on_cpu, on_gpu = decision.plan.shares
    assert (0, on_gpu.first_layer - 1, 7) == (on_cpu.first_layer, on_cpu.last_layer, on_gpu.last_layer)
    assert on_gpu.layers >= 4
    assert on_gpu.total_bytes <= 5 * GIB


def test_a_gpu_slower_than_the_cpu_is_left_alone():
    assert layers(placed(node("a", cpu(bandwidth=80e9), gpu(bandwidth=10e9)))) == {"CPU": 9}


def test_a_gpu_that_the_engine_does_not_list_is_left_alone():
    decision = placed(node("a", cpu(), gpu(usable=False)))

    assert layers(decision) == {"CPU": 9}
    assert "read_ms.CUDA0" not in parts(decision)


def test_two_gpus_together_hold_what_neither_holds_alone():
    decision = placed(node("a", cpu(), gpu("CUDA0", free=6 * GIB), gpu("CUDA1", free=6 * GIB)))

    held = layers(decision)
    assert held["CPU"] == 0
    assert held["CUDA0"] + held["CUDA1"] == 9
    assert [share.device_id for share in decision.plan.shares] == ["CPU", "CUDA0", "CUDA1"]


def test_the_faster_of_two_gpus_takes_a_model_that_fits_there():
    assert layers(placed(node("a", cpu(), gpu("CUDA0"), gpu("CUDA1", bandwidth=900e9)))) == {"CPU": 0, "CUDA1": 9}


def test_unified_memory_is_counted_once():
    """8 GiB of layers fit into 12 GiB, but not beside themselves."""
    fitting = node("a", cpu(free=12 * GIB), gpu(free=12 * GIB, unified=True))
    short = node("b", cpu(free=8 * GIB), gpu(free=8 * GIB, unified=True))

    decision = placed(fitting, short)

    assert decision.coordinator == "a"
    assert sum(share.total_bytes for share in decision.plan.shares) <= 12 * GIB
    assert decision.nodes[1].refusal.numbers["free_bytes"] == 8 * GIB


def test_the_node_with_the_fastest_memory_wins():
    decision = placed(node("slow", cpu(bandwidth=20e9)), node("fast", cpu(bandwidth=40e9)))

    assert decision.coordinator == "fast"


def test_a_node_that_is_generating_for_others_costs_as_much_again():
    busy = (Instance(instance_id="p", model="x", state=InstanceState.READY, active_streams=2),)

    decision = placed(node("a", instances=busy), node("b", cpu(bandwidth=12e9)))

    assert decision.coordinator == "b"
    assert parts(decision)["read_ms.CPU"] == parts(decision)["busy_ms"]
    assert parts(decision, 1)["busy_ms"] == 0


def test_pack_takes_the_fuller_of_equals_and_spread_the_emptier():
    fuller, emptier = node("b", cpu(free=20 * GIB)), node("a", cpu(free=60 * GIB, bandwidth=20.5e9))

    assert placed(fuller, emptier, strategy="pack").coordinator == "b"
    assert placed(fuller, emptier, strategy="spread").coordinator == "a"


def test_spread_prefers_the_node_with_fewer_instances_over_the_one_with_more_memory():
    running = (Instance(instance_id="p", model="x", state=InstanceState.READY),)
    nodes = [node("a", cpu(free=64 * GIB), instances=running), node("b", cpu(free=32 * GIB))]

    assert placed(*nodes, strategy="spread").coordinator == "b"
    assert placed(*nodes, strategy="pack").coordinator == "a"


def test_a_preferred_label_wins_among_equals_only():
    equal = node("z", cpu(bandwidth=19.5e9), labels={"ssd": ""})
    slower = node("y", cpu(bandwidth=18e9), labels={"ssd": ""})

    assert placed(node("a"), equal, prefer=("ssd",)).coordinator == "z"
    assert placed(node("a"), slower, prefer=("ssd",)).coordinator == "a"


def test_equals_in_everything_go_by_node_id():
    assert placed(node("c"), node("a"), node("b")).coordinator == "a"


def test_the_context_is_clamped_to_what_the_model_was_trained_for():
    nodes = [node("a", models=(model(of=shape(context_length=2048)),))]

    assert placed(*nodes, context_per_slot=100_000).plan.context_per_slot == 2048


def test_a_shape_with_more_context_needs_more():
    assert (
        placed(node("a"), context_per_slot=8192).plan.shares[0].kv_bytes
        == 8 * placed(node("a")).plan.shares[0].kv_bytes
    )


def test_unmeasured_bandwidth_has_a_documented_default():
    decision = placed(node("a", cpu(bandwidth=0)))

    assert pytest.approx(decision.nodes[0].score) == (8 * GIB + GIB // 2) / 20e9 * 1000


def test_a_unified_gpu_without_a_figure_reads_as_fast_as_the_cpu_and_is_taken():
    assert layers(placed(node("a", cpu(), gpu("Metal", bandwidth=0, unified=True)))) == {"CPU": 0, "Metal": 9}


def test_the_table_shows_every_node_every_part_and_the_devices_of_the_plan():
    text = explain(placed(node("big", cpu(), gpu()), node("small", cpu(free=2 * GIB))))

    assert "BEST" in text
    assert "MEMORY_SHORT" in text
    assert "read_ms.CUDA0" in text
    assert "0-7 + output" in text
    assert f"{2 * GIB:,}" in text
