"""Plans count with the links that agents measured, keep nodes apart that cannot reach each other, and say when ready."""

from math import isclose

import pytest
from msgspec.structs import replace
from sollol.link import Link, PlanLink
from sollol.report import Decision, NodeStatus, RpcTransport, ScorePart

from sollold.placement import PlacementDefaults, decide
from sollold.placement import links as placement_links
from sollold.placement.explain import as_json, explain
from sollold.placement.links import DEFAULT_LINK, Links, measured
from sollold.placement.ready import DISK_BYTES_PER_S, START_S
from tests.placement_cases import GIB, cpu, gpu, model, node
from tests.random_clusters import wish, with_rpc

DEFAULTS = PlacementDefaults(parallel=1, context_per_slot=1024)


def to(node_id: str, rtt_s: float = 0.0002, bytes_per_s: float = 1e8, **more) -> Link:
    return Link(node_id=node_id, rtt_s=rtt_s, bytes_per_s=bytes_per_s, **more)


def gone(node_id: str, age_s: float = 5.0, address: str = "10.0.0.1:7462") -> Link:
    return Link(node_id=node_id, unreachable=True, age_s=age_s, address=address)


def able(node_id: str, *devices, links: tuple[Link, ...] = (), file: bool = False, **more) -> NodeStatus:
    return with_rpc(node(node_id, *devices, models=(model(),) if file else (), **more), links=links)


def placed(*nodes: NodeStatus, defaults: PlacementDefaults = DEFAULTS, **wishes) -> Decision:
    return decide(wish(**wishes), nodes, defaults)


def small(node_id: str, **more) -> NodeStatus:
    """Room for a bit more than half of the 8 layers."""
    return able(node_id, cpu(free=6 * GIB), **more)


def lenders(decision: Decision) -> set[str]:
    return {share.node_id for share in decision.plan.shares} - {"", decision.coordinator}


def layers(decision: Decision) -> dict[str, int]:
    found: dict[str, int] = {}
    for share in decision.plan.shares:
        name = share.node_id or decision.coordinator
        found[name] = found.get(name, 0) + share.layers
    return found


def parts(decision: Decision) -> dict[str, float]:
    return next({part.name: part.value for part in each.parts} for each in decision.nodes if each.best)


def test_a_hop_costs_what_was_measured_in_each_direction():
    slow_back = (to("a", rtt_s=0.009, bytes_per_s=1e6),)
    decision = placed(
        small("a", links=(to("b", rtt_s=0.003, bytes_per_s=5e7),), file=True), small("b", links=slow_back)
    )

    assert isclose(parts(decision)["hop_ms.b"], 1 + 3 + 4096 / 5e7 * 1000 + 4096 / 1e6 * 1000)
    assert decision.links == (PlanLink(node_id="b", rtt_s=0.003, bytes_per_s=1e6, age_s=1.0),)


def test_what_only_the_other_node_measured_counts_both_ways():
    decision = placed(small("a", file=True), small("b", links=(to("a", rtt_s=0.003, bytes_per_s=5e7, age_s=60),)))

    assert isclose(parts(decision)["hop_ms.b"], 1 + 3 + 2 * 4096 / 5e7 * 1000)
    assert decision.links == (PlanLink(node_id="b", rtt_s=0.003, bytes_per_s=5e7, age_s=61.0),)


def test_where_nobody_has_measured_the_record_says_that_the_link_is_assumed():
    decision = placed(small("a", file=True), small("b"))

    (link,) = decision.links
    assert link == PlanLink(node_id="b", rtt_s=DEFAULT_LINK.rtt_s, bytes_per_s=DEFAULT_LINK.bytes_per_s)
    assert "Not measured yet, assumed: the link to b" in explain(decision)
    assert "Not measured yet" not in explain(placed(small("a", file=True, links=(to("b"),)), small("b")))


def test_of_two_equal_nodes_the_one_behind_the_faster_link_lends():
    for fast, slow in (("b", "c"), ("c", "b")):
        links = (to(fast, bytes_per_s=1e8), to(slow, bytes_per_s=5e5))
        assert lenders(placed(small("a", file=True, links=links), small("b"), small("c"))) == {fast}


def test_a_node_with_a_gpu_is_left_out_when_its_link_costs_more_than_it_saves():
    a, b = cpu(free=12 * GIB), (cpu(), gpu(free=12 * GIB))
    near = placed(able("a", a, links=(to("b"),), file=True), able("b", *b))
    far = placed(able("a", a, links=(to("b", rtt_s=0.5),), file=True), able("b", *b))

    assert lenders(near) == {"b"}
    assert layers(far) == {"a": 9}


def test_nodes_that_cannot_reach_each_other_are_not_of_one_plan():
    b, c = small("b"), able("c", cpu(free=6 * GIB, bandwidth=5e9))
    assert lenders(placed(small("a", file=True), b, c)) == {"b"}
    assert lenders(placed(small("a", links=(gone("b"),), file=True), b, c)) == {"c"}


def test_it_is_the_coordinators_word_that_counts_for_it_is_the_one_that_connects():
    a, b = small("a", file=True), small("b", links=(gone("a"),), file=True)
    assert placed(a, b).coordinator == "a"
    assert placed(small("a", links=(gone("b"),), file=True), small("b", file=True)).coordinator == "b"


def tunnelled(status: NodeStatus) -> NodeStatus:
    return replace(status, report=replace(status.report, rpc_transport=RpcTransport.TUNNEL))


def test_nodes_that_carry_rpc_bytes_in_different_ways_are_not_of_one_plan():
    a, b, c = small("a", file=True), small("b"), able("c", cpu(free=6 * GIB, bandwidth=5e9))
    assert lenders(placed(a, tunnelled(b), c)) == {"c"}
    assert lenders(placed(tunnelled(a), tunnelled(b), c)) == {"b"}


def test_a_refusal_says_which_nodes_carry_rpc_bytes_in_which_way():
    decision = placed(small("a", file=True), tunnelled(small("b")))

    assert "RPC bytes of b travel by tunnel, of a directly: set rpc_transport alike" in explain(decision)
    assert "rpc_transport" not in explain(placed(small("a", file=True)))


def test_a_node_out_of_reach_lends_nothing():
    a, b, c = small("a", file=True), small("b"), able("c", cpu(free=6 * GIB, bandwidth=5e9))
    assert lenders(placed(a, replace(b, connected=False), c)) == {"c"}


def test_a_refusal_says_who_cannot_reach_whom():
    others = [f"b{at}" for at in range(6)]
    decision = placed(small("a", links=tuple(gone(name) for name in others), file=True), *map(small, others))

    assert "a cannot reach b0, a cannot reach b1" in decision.refusal.message
    assert decision.refusal.message.endswith("and 2 more")
    assert "a cannot reach b0" in explain(decision)


@pytest.mark.parametrize(("age_s", "report_age_s", "kept_apart"), [(50, 5, True), (50, 20, False), (100, 0, False)])
def test_an_old_word_of_a_node_out_of_reach_counts_no_more(age_s, report_age_s, kept_apart):
    a = replace(small("a", links=(gone("b", age_s),)), report_age_s=report_age_s)
    assert measured(Links(), [a, small("b")]).reaches("a", "b") is not kept_apart


def test_a_node_that_has_moved_may_be_in_reach_where_it_is_now():
    a = small("a", links=(gone("b", address="10.9.0.2:7462"),))
    assert measured(Links(), [a, small("b")]).reaches("a", "b")


def test_figures_that_cannot_be_are_not_counted_with():
    assert measured(Links(), [small("a", links=(to("b", bytes_per_s=0.0),))]).between("a", "b") == DEFAULT_LINK


def test_a_node_is_ready_when_its_file_is_read_and_each_lender_has_its_weights():
    links = (to("b", bytes_per_s=2e7),)
    decision = placed(small("a", links=links, file=True), small("b"))

    moved = {share.node_id: share.weight_bytes for share in decision.plan.shares if share.node_id}
    assert decision.ready_parts == (
        ScorePart("start_s", START_S),
        ScorePart("read_s.a", 9 * GIB / DISK_BYTES_PER_S),
        ScorePart("move_s.b", moved["b"] / 2e7),
        ScorePart("move_s.a", moved["a"] / placement_links.OWN_NODE.bytes_per_s),
    )
    assert isclose(decision.ready_s, sum(part.value for part in decision.ready_parts))


def test_a_single_node_only_reads_and_classic_predicts_nothing():
    alone = placed(able("a", cpu(), file=True))
    assert alone.ready_parts == (ScorePart("start_s", START_S), ScorePart("read_s.a", 9 * GIB / DISK_BYTES_PER_S))
    assert explain(alone).endswith("Until ready: 0.7 s starting + 19.3 s reading on a = 20.0 s")

    classic = placed(able("a", cpu(), file=True), policy="classic")
    assert (classic.ready_s, classic.ready_parts, classic.links) == (None, (), ())
    assert "ready" not in explain(classic)
    assert not {"ready_s", "ready_parts", "links"} & as_json(classic).keys()


def test_the_explanation_shows_each_hops_link_and_the_terms_of_readiness():
    text = explain(placed(small("a", links=(to("b", 0.00234, 1.25e7),), file=True), small("b")))
    row = next(line for line in text.splitlines() if line.split()[:3] == ["b", "CPU", "0-3"])

    assert row.split()[-2:] == ["2.340", "12.5"]
    terms = "0.7 s starting + 19.3 s reading on a + 343.6 s moving to b + 2.4 s moving to a"
    assert f"Until ready: {terms} = 366.0 s" in text


def test_programs_get_links_and_readiness():
    record = as_json(placed(small("a", links=(to("b", age_s=9.0),), file=True), small("b")))

    assert list(record["links"]) == [{"node_id": "b", "rtt_s": 0.0002, "bytes_per_s": 1e8, "age_s": 10.0}]
    assert isclose(record["ready_s"], sum(record["ready_parts"].values()))
    assert list(record["ready_parts"]) == ["start_s", "read_s.a", "move_s.b", "move_s.a"]


def barely_faster(link: Link) -> Decision:
    """`a` has the file and room for most of it, `b` for all of it and memory that is 3 % faster."""
    return placed(
        able("a", cpu(free=8 * GIB), links=(link,), file=True), able("b", cpu(free=12 * GIB, bandwidth=20.6e9))
    )


def test_of_plans_that_are_equally_fast_one_that_is_ready_much_sooner_is_taken():
    """Otherwise nine gigabytes cross the network for 3 % that no prediction is good enough for."""
    decision = barely_faster(to("b", bytes_per_s=1.1e8))

    assert layers(decision)["a"] >= 6
    assert (
        dict(decision.ready_parts[1:] and [(part.name, part.value) for part in decision.ready_parts])["move_s.b"] < 30
    )


def test_where_moving_takes_no_time_the_faster_plan_is_taken():
    assert layers(barely_faster(to("b", bytes_per_s=1e10))) == {"a": 0, "b": 9}


def test_a_plan_that_is_more_than_5_percent_slower_is_never_taken_for_the_time_before():
    a = able("a", cpu(free=8 * GIB), links=(to("b", bytes_per_s=1e7),), file=True)
    fast = able("b", cpu(free=12 * GIB, bandwidth=60e9))

    assert layers(placed(a, fast)) == {"a": 0, "b": 9}
