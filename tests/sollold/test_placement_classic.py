"""The seed's formula, to the megabyte and to the character."""

import json

import pytest
from sollol.errors import Reason, SollolError
from sollol.report import PlacementWish

from sollold.placement import PlacementDefaults, decide
from sollold.placement.classic import estimate_mb
from sollold.placement.explain import as_json, explain
from sollold.placement.offline import nodes_from_json
from tests.placement_cases import GIB, MODEL, cpu, gpu, node

SEED_NODES = json.dumps(
    [
        {"host": "192.168.1.10", "cpu_ram_mb": 16000, "gpu_vram_mb": 0, "has_gpu": False},
        {"host": "192.168.1.20", "cpu_ram_mb": 128000, "gpu_vram_mb": 24000, "has_gpu": True},
        {"host": "192.168.1.21", "cpu_ram_mb": 32000, "gpu_vram_mb": 0, "has_gpu": False},
    ]
)
SEED_TABLE = """\
Selecting coordinator node for llama3.1:70b (estimated 143360MB needed)
  192.168.1.10: RAM=16000MB, GPU_VRAM=0MB, score=-127360
  192.168.1.20: RAM=128000MB, GPU_VRAM=24000MB, score=13640 [ok] BEST
  192.168.1.21: RAM=32000MB, GPU_VRAM=0MB, score=-111360
Selected 192.168.1.20 for coordinator (score=13640)"""


def placed(model, nodes=SEED_NODES):
    wish = PlacementWish(model=model, policy="classic")
    return decide(wish, nodes_from_json(nodes), PlacementDefaults(), files_known=False)


def test_the_worked_example_of_the_seed_prints_just_so():
    assert explain(placed("llama3.1:70b")) == SEED_TABLE


def test_the_json_of_the_worked_example_has_the_same_numbers():
    record = as_json(placed("llama3.1:70b"))

    assert (record["estimate_mb"], record["coordinator"]) == (143360, "192.168.1.20")
    assert [entry["score_mb"] for entry in record["nodes"]] == [-127360, 13640, -111360]
    assert record["nodes"][1]["parts"] == {
        "ram_mb": 128000,
        "vram_mb": 24000,
        "estimate_mb": -143360,
        "gpu_bonus_mb": 5000,
    }
    assert record["nodes"][0]["parts"] == {"ram_mb": 16000, "vram_mb": 0, "estimate_mb": -143360, "gpu_bonus_mb": 0}


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [("llama3.1:70b", 143360), ("llama3", 16384), ("qwen:1.5b", 10240), ("mixtral-8x7b", 14336), ("m:0b", 0)],
)
def test_the_estimate_comes_from_the_first_billions_in_the_name(name, megabytes):
    assert megabytes == estimate_mb(name)


def test_no_positive_score_is_a_refusal_with_the_table():
    decision = placed("llama3.1:405b")

    assert decision.refusal is not None
    assert decision.refusal.reason is Reason.NO_FIT
    assert "192.168.1.21: RAM=32000MB, GPU_VRAM=0MB, score=-797440" in decision.refusal.message
    assert decision.coordinator == ""


def test_a_score_of_exactly_zero_does_not_win():
    exact = '[{"host": "a", "cpu_ram_mb": 143360}]'

    assert placed("llama3.1:70b", exact).refusal is not None
    assert placed("llama3.1:70b", exact.replace("143360", "143361")).coordinator == "a"


def test_classic_counts_totals_and_ignores_what_is_free():
    decision = decide(
        PlacementWish(model=MODEL, policy="classic"), [node("a", cpu(free=10 * GIB))], PlacementDefaults()
    )

    assert decision.nodes[0].score == 128 * 1024 - 8 * 2048


def test_unified_gpu_memory_is_not_added_to_the_ram_but_earns_the_bonus():
    decision = decide(
        PlacementWish(model=MODEL, policy="classic"), [node("a", cpu(), gpu(unified=True))], PlacementDefaults()
    )

    assert {"vram_mb": 0.0, "gpu_bonus_mb": 5000.0}.items() <= {
        p.name: p.value for p in decision.nodes[0].parts
    }.items()


def test_classic_plans_with_the_memory_model_when_the_header_is_known():
    decision = decide(PlacementWish(model=MODEL, policy="classic"), [node("a", cpu(), gpu())], PlacementDefaults())

    assert decision.plan is not None
    assert sum(share.layers for share in decision.plan.shares) == 9


def test_online_classic_refuses_a_node_without_the_model():
    decision = decide(
        PlacementWish(model=MODEL, policy="classic"),
        [node("a", models=()), node("b", cpu(total=20 * GIB))],
        PlacementDefaults(),
    )

    assert decision.coordinator == "b"
    assert Reason.MODEL_ABSENT is decision.nodes[0].refusal.reason


def test_fit_needs_headers_that_a_node_list_does_not_have():
    with pytest.raises(SollolError, match=r"INVALID_REQUEST.*policy classic"):
        decide(
            PlacementWish(model="m", policy="fit"), nodes_from_json(SEED_NODES), PlacementDefaults(), files_known=False
        )
