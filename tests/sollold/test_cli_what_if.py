"""`sollol place --what-if`: variants of a wish side by side."""

import json
import re

import pytest
from sollol.errors import Reason, SollolError
from sollol.report import PlacementWish

from sollold.cli.arguments import parser
from sollold.cli.variants import KNOBS, variants
from sollold.placement import PlacementDefaults, decide
from sollold.placement.compare import COLUMNS, compared
from tests.fakes.fake_head import fake_head
from tests.placement_cases import GIB, MODEL, cpu, gpu, node
from tests.random_clusters import with_rpc
from tests.sollol_command import sollol

WISH = PlacementWish(model=MODEL, parallel=2)
DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=1024)


def rows(wish, nodes, *sets, defaults=DEFAULTS):
    named = variants(wish, [words.split() for words in sets])
    found = compared([(name, decide(one, nodes, defaults)) for name, one in named])
    return [dict(zip(COLUMNS, row, strict=True)) for row in found]


def test_the_wish_itself_comes_first_and_each_set_changes_what_it_names():
    named = variants(WISH, [["context=32768", "parallel=4", "kv=q8_0"], ["max-nodes=2", "backends=1", "pin=a=b"]])

    assert named == [
        ("as asked", WISH),
        (
            "context=32768 parallel=4 kv=q8_0",
            PlacementWish(model=MODEL, context_per_slot=32768, parallel=4, kv_type="q8_0"),
        ),
        (
            "max-nodes=2 backends=1 pin=a=b",
            PlacementWish(model=MODEL, parallel=2, max_nodes=2, backends_per_pool=1, pinned_node="a=b"),
        ),
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("contxt=1", "--what-if contxt=1: did you mean context?"),
        ("speed=11", "what can vary: context, parallel, kv"),
        ("context", "write context=VALUE"),
        ("context=", "write context=VALUE"),
        ("=3", "what can vary"),
        ("parallel=x", "x is not a whole number"),
        ("parallel=-1", "-1 is not a whole number"),
        ("parallel=1e3", "1e3 is not a whole number"),
        ("context=9999999999", "too large"),
        ("kv=f16 kv=q8_0", "kv is set twice"),
        ("max_nodes=1 max-nodes=2", "set twice"),
    ],
)
def test_a_word_that_varies_nothing_is_refused_by_name(words, complaint):
    with pytest.raises(SollolError) as refused:
        variants(WISH, [words.split()])

    assert refused.value.refusal.reason is Reason.INVALID_REQUEST
    assert complaint in refused.value.refusal.message


def test_help_names_what_can_vary():
    (place,) = (action.choices["place"] for action in parser()._actions if action.choices)
    text = " ".join(place.format_help().split())

    assert f"names: {', '.join(KNOBS)} " in text


def test_a_row_has_the_coordinator_layers_bytes_and_milliseconds_of_its_decision():
    case = [with_rpc(node("a", cpu(free=6 * GIB))), with_rpc(node("b", cpu(free=6 * GIB), models=()))]
    base, longer = rows(PlacementWish(model=MODEL), case, "context=2048")
    decision = decide(PlacementWish(model=MODEL), case, DEFAULTS)

    assert base["FITS"] == "yes"
    assert (base["COORDINATOR"], base["NODES"]) == ("a", "2")
    assert base["LAYERS"] == "b/CPU 0-3, a/CPU 4-7 + output"
    assert base["TOTAL BYTES"] == f"{sum(share.total_bytes for share in decision.plan.shares):,}"
    assert base["KV BYTES"] == f"{sum(share.kv_bytes for share in decision.plan.shares):,}"
    assert base["MS/TOKEN"] == f"{next(verdict.score for verdict in decision.nodes if verdict.best):.3f}"
    assert base["WHY NOT"] == ""
    assert int(longer["KV BYTES"].replace(",", "")) == 2 * int(base["KV BYTES"].replace(",", ""))


def test_what_does_not_fit_says_why_and_a_reduced_context_is_told():
    case = [node("a", cpu(free=11 * GIB))]
    asked, long = rows(PlacementWish(model=MODEL), case, "context=8192 parallel=64")
    (reduced,) = rows(PlacementWish(model=MODEL, context_per_slot=8192, parallel=64, allow_reduced_context=True), case)

    assert asked["FITS"] == "yes"
    assert long["FITS"] == "no"
    assert long["WHY NOT"].startswith("NO_FIT: no node can take")
    assert re.fullmatch(r"with a context of \d+", reduced["FITS"])


def test_policy_classic_has_no_milliseconds():
    case = [node("a", cpu(), gpu())]
    fit, classic = rows(PlacementWish(model=MODEL), case, "policy=classic")

    assert (classic["COORDINATOR"], classic["MS/TOKEN"]) == ("a", "-")
    assert fit["MS/TOKEN"] != "-"


async def test_the_command_prints_a_table_or_a_list_of_decisions():
    async with fake_head() as (servicer, address):
        words = ("--head", address, "place", MODEL, "--what-if", "context=2048", "kv=q8_0", "--what-if", "pin=none")
        status, out, err = await sollol(*words)
        _, listed, _ = await sollol(*words, "--json")

    assert (status, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "VARIANT",
        "as asked",
        "context=2048 kv=q8_0",
        "pin=none",
    ]
    record = json.loads(listed)
    assert record["schema"] == "sollol.what-if/v1"
    assert [each["variant"] for each in record["decisions"]] == ["as asked", "context=2048 kv=q8_0", "pin=none"]
    assert [each["coordinator"] for each in record["decisions"]] == ["big", "big", None]
    assert record["decisions"][2]["refusal"]["reason"] == "NO_FIT"
    assert [wish.context_per_slot for wish in servicer.asked] == [None, 2048, None] * 2


async def test_when_no_variant_fits_the_exit_code_is_that_of_what_was_asked():
    async with fake_head() as (_, address):
        status, out, _ = await sollol("--head", address, "place", "none:1b", "--what-if", "parallel=1")

    assert status == 4
    assert out.count("MODEL_NOT_FOUND") == 2


async def test_variants_work_over_a_node_list_without_a_head_too():
    nodes = json.dumps([{"host": "h", "cpu_ram_mb": 20000}, {"host": "i", "cpu_ram_mb": 30000}]).encode()
    status, out, _ = await sollol("place", "m:8b", "--nodes", "-", "--what-if", "pin=h", stdin=nodes)
    refused, _, err = await sollol("place", "m:8b", "--nodes", "-", "--what-if", "policy=fit", stdin=nodes)

    assert status == 0
    assert [line.split()[-6] for line in out.splitlines()[1:]] == ["i", "h"]
    assert refused == 2
    assert "GGUF header" in err
