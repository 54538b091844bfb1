"""What was observed of a model corrects what is predicted for its plans."""

import math
from random import Random

import pytest
from msgspec.structs import replace
from sollol.report import Decision, Instance, InstanceState, NodeStatus
from sollol.speed import PlanKey, SpeedObservation, plan_key

from sollold.placement import PlacementDefaults, decide
from sollold.placement.explain import as_json, explain
from sollold.placement.observed import MOST_FACTOR, observed_of
from tests.placement_cases import GIB, cpu, gpu, model, node
from tests.random_clusters import RPC, cluster, wish, with_rpc

DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=1024)
READ_MS = 8.5 * GIB / 20e9 * 1000
ALONE = ("CPU x4",)


def lab(node_id: str, *devices, speeds: tuple[SpeedObservation, ...] = (), file: bool = True, **more) -> NodeStatus:
    status = with_rpc(node(node_id, *(devices or (cpu(),)), models=(model(),) if file else (), **more))
    engine = replace(status.report.engine, threads=4)
    return replace(status, report=replace(status.report, engine=engine, speeds=speeds))


def seen(ms: float, *, predicted: float = READ_MS, devices=ALONE, layers=(9,), identity="same") -> SpeedObservation:
    return SpeedObservation(
        identity=identity,
        devices=devices,
        layers=layers,
        kv_type="f16",
        ms_per_token=ms,
        predicted_ms_per_token=predicted,
    )


def placed(*nodes: NodeStatus, **wishes) -> Decision:
    return decide(wish(**wishes), nodes, DEFAULTS)


def parts(decision: Decision, at: int = 0) -> dict[str, float]:
    return {part.name: part.value for part in decision.nodes[at].parts}


def key_of(decision: Decision) -> PlanKey:
    return plan_key(decision.plan.shares, "f16", lambda _: 4)


def observe(decision: Decision, nodes: list[NodeStatus], ms: float) -> list[NodeStatus]:
    """The nodes, once the plan of `decision` has run for so many ms per token."""
    key = key_of(decision)
    found = seen(ms, predicted=decision.plan.predicted_ms_per_token, devices=key.devices, layers=key.layers)
    return [with_newest(each, found) if each.report.node_id == decision.coordinator else each for each in nodes]


def with_newest(status: NodeStatus, found: SpeedObservation) -> NodeStatus:
    """An agent has one observation of each plan."""
    others = [each for each in status.report.speeds if (each.devices, each.layers) != (found.devices, found.layers)]
    return replace(status, report=replace(status.report, speeds=(found, *others)))


def score_of(decision: Decision) -> float:
    return next(verdict.score for verdict in decision.nodes if verdict.best)


def test_without_observations_nothing_is_corrected_and_the_plan_says_what_was_predicted():
    decision = placed(lab("a"))
    assert parts(decision) == {"read_ms.CPU": pytest.approx(READ_MS), "busy_ms": 0.0}
    assert decision.plan.predicted_ms_per_token == decision.nodes[0].score


def test_what_was_observed_on_this_plan_takes_the_place_of_the_prediction():
    decision = placed(lab("a", speeds=(seen(600.0),)))
    assert parts(decision)["observed_ms"] == pytest.approx(600 - READ_MS)
    assert decision.nodes[0].score == pytest.approx(600)
    assert decision.plan.predicted_ms_per_token == pytest.approx(READ_MS)


@pytest.mark.parametrize(
    "other",
    [
        {"identity": "another file"},
        {"ms": math.nan},
        {"ms": math.inf},
        {"ms": -1.0},
        {"ms": 0.0},
        {"predicted": math.nan},
        {"predicted": -1.0},
    ],
)
def test_what_cannot_be_or_is_of_another_file_is_not_believed(other):
    decision = placed(lab("a", speeds=(seen(**{"ms": 600.0, **other}),)))
    assert parts(decision).keys() == {"read_ms.CPU", "busy_ms"}


def test_parts_still_add_up_when_other_pools_generate():
    busy = Instance(instance_id="x", model="other", state=InstanceState.READY, active_streams=1)
    decision = placed(lab("a", speeds=(seen(600.0),), instances=(busy,)))
    assert decision.nodes[0].score == pytest.approx(sum(parts(decision).values())) == pytest.approx(600 + READ_MS)


def test_a_node_that_turned_out_slower_than_another_is_left_for_it():
    fast, slow = lab("a", cpu(bandwidth=22e9)), lab("b")
    assert placed(fast, slow).coordinator == "a"
    observed = (seen(700.0, predicted=READ_MS * 20 / 22),)
    known = (seen(450.0),)
    assert placed(lab("a", cpu(bandwidth=22e9), speeds=observed), lab("b", speeds=known)).coordinator == "b"


def test_a_plan_that_never_ran_is_as_far_off_as_others_of_the_model():
    decision = placed(lab("a", speeds=(seen(2 * READ_MS),)), lab("b", cpu(bandwidth=19e9)))
    assert decision.coordinator == "a"  # not b, for looking better than what is known
    assert parts(decision, at=1)["scaled_ms"] == pytest.approx(READ_MS * 20 / 19)
    assert decision.nodes[1].score == pytest.approx(2 * READ_MS * 20 / 19)


def test_the_same_devices_tell_more_than_other_plans_of_the_model():
    gpus = {"devices": ("CPU x4", "CUDA0"), "layers": (3, 6), "predicted": 100.0}
    speeds = (seen(150.0, **gpus), seen(3 * READ_MS), seen(3 * READ_MS, layers=(8,)))
    decision = placed(lab("a", cpu(), gpu(free=5 * GIB), speeds=speeds))
    assert key_of(decision).devices == gpus["devices"]
    assert key_of(decision).layers != gpus["layers"]
    predicted = decision.plan.predicted_ms_per_token
    assert parts(decision)["scaled_ms"] == pytest.approx(predicted * 0.5)


def test_other_threads_are_another_plan():
    decision = placed(lab("a", speeds=(seen(2 * READ_MS, devices=("CPU x2",)),)))
    assert "observed_ms" not in parts(decision)
    assert parts(decision)["scaled_ms"] == pytest.approx(READ_MS)


def test_a_factor_has_bounds_and_one_without_a_prediction_is_none():
    wild = placed(lab("a", speeds=(seen(1000 * READ_MS, devices=("CUDA7",)),)))
    assert wild.nodes[0].score == pytest.approx(MOST_FACTOR * READ_MS)
    unknown = placed(lab("a", speeds=(seen(600.0, predicted=0.0, devices=("CUDA7",)),)))
    assert parts(unknown)["scaled_ms"] == 0.0


def two_halves() -> list[NodeStatus]:
    return [lab("a", cpu(free=6 * GIB)), lab("b", cpu(free=6 * GIB), file=False)]


def test_a_plan_over_several_nodes_gets_what_was_observed_of_it():
    nodes = two_halves()
    first = placed(*nodes)
    again = placed(*observe(first, nodes, 999.0))
    assert key_of(again) == key_of(first) == PlanKey(("b/CPU x4", "a/CPU x4"), (4, 5), "f16")
    assert score_of(again) == pytest.approx(sum(parts(again).values())) == pytest.approx(999.0)
    assert again.plan.predicted_ms_per_token == pytest.approx(score_of(first))


def test_one_layer_moved_is_no_new_chance_for_devices_that_were_slow():
    """Else every load would try a neighbour of the plan that was slower than predicted."""
    nodes = [lab("a", cpu(free=7 * GIB)), lab("b", cpu(free=7 * GIB), file=False)]
    first = placed(*nodes)
    again = placed(*observe(first, nodes, 3 * score_of(first)))
    assert key_of(again) == key_of(first)


def test_of_lenders_the_one_that_turned_out_slow_is_left_for_another():
    nodes = [
        lab("a", cpu(free=3 * GIB)),
        lab("b", cpu(free=20 * GIB, bandwidth=22e9), file=False),
        lab("c", cpu(free=20 * GIB, bandwidth=20e9), file=False),
    ]
    first = placed(*nodes)
    assert {share.node_id for share in first.plan.shares if share.layers} == {"b"}
    slow = observe(first, nodes, 1.6 * score_of(first))
    assert {share.node_id for share in placed(*slow).plan.shares if share.layers} == {
        "b"
    }  # c may be as slow: the model
    known = observe(placed(nodes[0], nodes[2]), slow, 1.2 * score_of(first))
    assert {share.node_id for share in placed(*known).plan.shares if share.layers} == {"c"}


def test_a_single_node_that_turned_out_slow_is_left_for_several():
    nodes = [lab("a", cpu(bandwidth=20e9)), lab("b", cpu(bandwidth=21.1e9), file=False)]
    alone = placed(*nodes)
    assert key_of(alone).devices == ALONE
    split = placed(*nodes, backends_per_pool=1)
    known = observe(alone, observe(split, nodes, 300.0), 800.0)
    decision = placed(*known)
    assert key_of(decision) == key_of(split)
    assert score_of(decision) == pytest.approx(300.0)


def test_several_nodes_that_turned_out_slow_are_left_for_a_single_one():
    nodes = [lab("a", cpu(bandwidth=10e9)), lab("b", cpu(bandwidth=40e9), file=False)]
    split = placed(*nodes)
    assert len({share.node_id for share in split.plan.shares if share.layers}) == 1
    alone = placed(*nodes, max_nodes=1)
    known = observe(alone, observe(split, nodes, 2000.0), alone.plan.predicted_ms_per_token)
    decision = placed(*known)
    assert key_of(decision).devices == ALONE
    assert score_of(decision) == pytest.approx(alone.plan.predicted_ms_per_token)


def test_the_order_of_nodes_changes_nothing():
    nodes = [lab(name, cpu(bandwidth=20e9 + at * 1e8)) for at, name in enumerate("abcd")]
    nodes = observe(placed(*nodes), nodes, 700.0)
    assert placed(*nodes) == placed(*nodes[::-1])


def test_the_explanation_says_what_was_predicted_and_what_was_observed():
    text = explain(placed(lab("a", speeds=(seen(600.0),))))
    assert f"Predicted {READ_MS:.3f} ms/token, observed on this plan 600.000" in text
    assert "observed_ms" in text
    assert "(score=600 ms/token)" in text
    scaled = explain(placed(lab("a", speeds=(seen(2 * READ_MS, layers=(8,)),))))
    assert f"{2 * READ_MS:.3f} by what was observed of this model on other plans" in scaled
    assert "observed" not in explain(placed(lab("a")))


def test_the_explanation_of_a_plan_over_several_nodes_adds_up():
    nodes = two_halves()
    text = explain(placed(*observe(placed(*nodes), nodes, 999.0)))
    (line,) = [line for line in text.splitlines() if line.startswith("Per token: ")]
    assert line.endswith("ms as observed = 999.000 ms")


def test_programs_get_prediction_and_correction():
    record = as_json(placed(lab("a", speeds=(seen(600.0),))))
    assert record["nodes"][0]["parts"]["observed_ms"] == pytest.approx(600 - READ_MS)
    assert record["plan"]["predicted_ms_per_token"] == pytest.approx(READ_MS)


def test_the_newest_observation_of_the_same_devices_decides():
    nodes = [lab("a", speeds=(seen(500.0, layers=(8,)), seen(900.0, layers=(7,))))]
    found = observed_of(nodes, [model()])
    assert found.by_devices == {("a", frozenset({"a/CPU x4"})): pytest.approx(500.0 / READ_MS)}
    assert found.factor == pytest.approx(700.0 / READ_MS)


@pytest.mark.parametrize("seed", range(60))
def test_no_plan_is_taken_that_one_that_ran_before_is_known_to_beat(seed):
    """Over a few loads, each of which turns out to take half to twice as long as predicted."""
    random = Random(seed)
    four = replace(RPC, threads=4)
    nodes = [with_rpc(each, four, instances=()) for each in cluster(random, most_nodes=4, most_layers=12)]
    known: dict[tuple[str, PlanKey], float] = {}
    for _ in range(4):
        decision = placed(*nodes)
        if decision.plan is None:
            return
        best = next(verdict for verdict in decision.nodes if verdict.best)
        assert best.score == pytest.approx(sum(part.value for part in best.parts))
        assert best.score <= 1.06 * min(known.values(), default=math.inf)
        plan = decision.coordinator, key_of(decision)
        known[plan] = random.uniform(0.5, 2.0) * decision.plan.predicted_ms_per_token
        nodes = observe(decision, nodes, known[plan])
