"""Each filter says why, and the cluster's refusal says what to do."""

import pytest
from msgspec.structs import replace
from sollol.errors import Reason, Refusal, Retry, SollolError
from sollol.report import Instance, InstanceState, PlacementWish

from sollold.config import HeadConfig
from sollold.placement import PlacementDefaults, decide
from tests.placement_cases import GIB, MODEL, cpu, model, node

CORRUPT = Refusal(reason=Reason.MODEL_CORRUPT, message="header is cut off")


def backing_off(of=MODEL):
    return (Instance(instance_id="p0", model=of, state=InstanceState.BACKOFF),)


@pytest.mark.parametrize(
    ("reason", "wish", "refused"),
    [
        (Reason.STALE_REPORT, {}, node("bad", age_s=8.1)),
        (Reason.AGENT_UNREACHABLE, {}, replace(node("bad"), connected=False)),
        (Reason.CORDONED, {}, node("bad", cordoned=True)),
        (Reason.NOT_PINNED, {"pinned_node": "good"}, node("bad")),
        (Reason.NOT_LOCAL, {"local": True}, node("bad", host="10.0.0.2")),
        (Reason.LABEL_MISSING, {"require": ("fast",)}, node("bad")),
        (Reason.LABEL_MISSING, {"require": ("fast", "zone=a")}, node("bad", labels={"fast": "", "zone": "b"})),
        (Reason.CPUS_SHORT, {"min_cpus": 8}, node("bad", cpu_count=7)),
        (Reason.MEMORY_SHORT, {"min_memory_bytes": 64 * GIB}, node("bad", cpu(free=64 * GIB - 1))),
        (Reason.ENGINE_MISSING, {}, node("bad", engine=False)),
        (Reason.MODEL_ABSENT, {}, node("bad", models=(model("other"),))),
        (Reason.MODEL_CORRUPT, {}, node("bad", models=(model(problem=CORRUPT),))),
        (Reason.BACKING_OFF, {}, node("bad", instances=backing_off())),
        (Reason.MEMORY_SHORT, {}, node("bad", cpu(free=4 * GIB))),
    ],
)
def test_a_filter_refuses_the_node_and_leaves_the_good_one(reason, wish, refused):
    good = node("good", host="127.0.0.1", labels={"fast": "yes", "zone": "a"})

    decision = decide(PlacementWish(model=MODEL, **wish), [refused, good], PlacementDefaults())

    assert decision.coordinator == "good"
    assert reason is decision.nodes[0].refusal.reason
    assert decision.nodes[0].score is None


def test_local_means_the_heads_host_or_loopback():
    nodes = [node("own", host="10.0.0.9"), node("other", host="10.0.0.8")]

    decision = decide(PlacementWish(model=MODEL, local=True), nodes, PlacementDefaults(), head_host="10.0.0.9")

    assert decision.coordinator == "own"


def test_another_models_trouble_does_not_keep_this_one_away():
    assert decide(PlacementWish(model=MODEL), [node("a", instances=backing_off("x"))], PlacementDefaults()).coordinator


def test_a_pool_that_keeps_failing_under_the_name_asked_for_keeps_the_model_away_where_that_is_an_alias():
    """A pool has the name that was asked for, whatever the node calls the file."""
    only = node("a", models=(model("org/tiny:Q4", aliases=(MODEL,)),), instances=backing_off(MODEL))

    decision = decide(PlacementWish(model=MODEL), [only], PlacementDefaults())

    assert [verdict.refusal.reason for verdict in decision.nodes] == [Reason.BACKING_OFF]


def test_a_cordon_may_end_so_asking_again_later_makes_sense():
    decision = decide(PlacementWish(model=MODEL), [node("a", cordoned=True)], PlacementDefaults())

    assert decision.refusal.retry is decision.nodes[0].refusal.retry is Retry.RETRYABLE


def test_an_alias_finds_the_model_and_the_plan_carries_its_name():
    nodes = [node("a", models=(model("org/tiny:Q4", aliases=("tiny",)),))]

    assert decide(PlacementWish(model="tiny"), nodes, PlacementDefaults()).plan.model == "org/tiny:Q4"


@pytest.mark.parametrize(
    ("nodes", "reason", "says"),
    [
        ([], Reason.NO_NODES, "sollol up"),
        ([node("a", age_s=60)], Reason.NO_NODES, "none of 1 known nodes"),
        ([node("a", age_s=60), replace(node("b"), connected=False)], Reason.NO_NODES, "none of 2 known nodes"),
        ([node("a", models=(model("tiny:7b"),))], Reason.MODEL_NOT_FOUND, "tiny:7b"),
        ([node("a", models=(model(problem=CORRUPT),))], Reason.MODEL_CORRUPT, "header is cut off"),
        ([node("a", cpu(free=4 * GIB))], Reason.NO_FIT, "largest possible fit: 3 of 9 layers on a"),
        # It may come back within seconds: not a 404.
        ([node("a", age_s=9), node("b", models=())], Reason.NO_FIT, "STALE_REPORT on 1"),
    ],
)
def test_nothing_placed_is_one_reason_that_says_what_to_do(nodes, reason, says):
    decision = decide(PlacementWish(model=MODEL), nodes, PlacementDefaults())

    assert decision.refusal is not None
    assert reason is decision.refusal.reason
    assert says in decision.refusal.message
    assert decision.plan is None


def test_a_shortage_names_the_bytes_and_whether_waiting_can_help():
    nodes = [node("small", cpu(free=4 * GIB, total=8 * GIB)), node("busy", cpu(free=4 * GIB))]

    decision = decide(PlacementWish(model=MODEL), nodes, PlacementDefaults())

    busy, small = (verdict.refusal for verdict in decision.nodes)
    assert (busy.retry, small.retry) == (Retry.RETRYABLE, Retry.FATAL)
    assert busy.numbers["needed_bytes"] > busy.numbers["free_bytes"] == 4 * GIB
    assert f"{busy.numbers['needed_bytes']:,}" in decision.refusal.message


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "best"},
        {"strategy": "x"},
        {"kv_type": "q9"},
        {"context_per_slot": 0},
        {"parallel": 10**9},
        {"require": ("=a",)},
    ],
)
def test_a_wish_that_means_nothing_is_an_invalid_request(wrong):
    with pytest.raises(SollolError) as caught:
        decide(PlacementWish(model=MODEL, **wrong), [node("a")], PlacementDefaults())
    assert Reason.INVALID_REQUEST is caught.value.refusal.reason


def test_the_defaults_are_the_heads_own():
    defaults, config = PlacementDefaults(), HeadConfig()

    for name in ("policy", "strategy", "context_per_slot", "parallel", "kv_type", "stale_after_s"):
        assert getattr(config, name) == getattr(defaults, name), name
