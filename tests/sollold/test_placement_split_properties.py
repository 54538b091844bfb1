"""What holds for every plan over several nodes: 1 000 random clusters and models."""

import os
from collections import defaultdict
from math import inf, isclose
from random import Random

import pytest
from msgspec.structs import replace
from sollol.report import Decision, NodeStatus

from sollold.placement import decide
from sollold.placement.explain import as_json, explain
from tests import brute_force, random_clusters
from tests.random_clusters import CONTEXT, DEFAULTS, wish

BATCHES = 20
EACH = int(os.environ.get("SOLLOL_TEST_CLUSTERS", "1000")) // BATCHES


def rounds(batch: int):
    for seed in range(batch * EACH, (batch + 1) * EACH):
        yield Random(seed)


def score(decision: Decision) -> float:
    return next((verdict.score for verdict in decision.nodes if verdict.best), inf)


def taken(decision: Decision) -> dict[tuple[str, str], int]:
    """Bytes by node and device."""
    found: dict[tuple[str, str], int] = defaultdict(int)
    for share in decision.plan.shares:
        found[share.node_id or decision.coordinator, share.device_id] += share.total_bytes
    return found


def assert_respects(decision: Decision, nodes: list[NodeStatus]) -> None:
    reports = {each.report.node_id: each.report for each in nodes}
    on_host: dict[str, int] = defaultdict(int)
    for (node_id, device_id), size in taken(decision).items():
        (device,) = (each for each in reports[node_id].devices if each.device_id == device_id)
        assert device.usable
        assert size <= device.free_bytes
        on_host[node_id] += size if device_id == "CPU" or device.unified else 0
    for node_id, size in on_host.items():
        assert size <= reports[node_id].devices[0].free_bytes
    shares = decision.plan.shares
    layers = reports[decision.coordinator].models[0].shape.layers
    assert sum(share.layers for share in shares) == layers + 1
    held = [
        at for share in shares if share.first_layer is not None for at in range(share.first_layer, share.last_layer + 1)
    ]
    assert held == list(range(layers))


def assert_told(decision: Decision) -> None:
    best = next(verdict for verdict in decision.nodes if verdict.best)
    assert best.score == sum(part.value for part in best.parts)
    text, lent = explain(decision), {share.node_id for share in decision.plan.shares} - {"", decision.coordinator}
    for verdict in decision.nodes:
        assert verdict.node_id in text
        assert verdict.best or bool(verdict.shares) == (verdict.node_id in lent)
    assert len(as_json(decision)["nodes"]) == len(decision.nodes)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_plans_are_within_5_percent_of_the_best_there_is_and_take_only_what_is_free(batch):
    for random in rounds(batch):
        most_nodes, most_layers = random.choice(((3, 5), (4, 3)))
        nodes = random_clusters.cluster(random, most_nodes=most_nodes, most_layers=most_layers)
        links = random_clusters.linked(random, nodes)
        correction = random_clusters.learned(random, nodes)
        decision = decide(wish(), nodes, DEFAULTS)
        solo = [v.score for v in decide(wish(max_nodes=1), nodes, DEFAULTS).nodes if v.score is not None]
        able = [at for at, each in enumerate(nodes) if each.report.models]
        shape = nodes[0].report.models[0].shape
        problem = brute_force.Problem(shape, nodes, (CONTEXT, 1), links, correction)
        least = min([*solo, brute_force.best_ms(problem, able)])

        assert score(decision) <= least * 1.05 or isclose(score(decision), least * 1.05)
        assert score(decision) >= least or isclose(score(decision), least)
        if decision.plan is not None:
            assert_respects(decision, nodes)
            assert_told(decision)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_node_of_a_plan_makes_it_slower_and_the_order_of_nodes_does_not_matter(batch):
    for random in rounds(batch):
        nodes = random_clusters.cluster(random, most_nodes=6, most_layers=24, others=0.2)
        random_clusters.linked(random, nodes)
        decision = decide(wish(), nodes, DEFAULTS)
        shuffled = list(nodes)
        random.shuffle(shuffled)
        assert decision == decide(wish(), shuffled, DEFAULTS)
        if decision.plan is None:
            continue
        assert_respects(decision, nodes)
        chosen = {verdict.node_id for verdict in decision.nodes if verdict.best or verdict.shares}
        engines = {nodes[int(node_id[1:])].report.engine for node_id in chosen}
        assert len(chosen) == 1 or (len(engines) == 1 and engines.pop().rpc)
        for left_out in chosen - {decision.coordinator}:
            rest = [each for each in nodes if each.report.node_id in chosen - {left_out}]
            fewer = decide(wish(pinned_node=decision.coordinator), rest, DEFAULTS)
            assert score(fewer) >= score(decision) or isclose(score(fewer), score(decision))


@pytest.mark.parametrize("batch", range(BATCHES // 4))
def test_wishes_about_nodes_are_kept(batch):
    for random in rounds(batch):
        nodes = random_clusters.cluster(random, most_nodes=5, most_layers=8)
        random_clusters.linked(random, nodes)
        most, backends = random.randint(1, 4), random.randint(0, 3)
        limited = decide(wish(max_nodes=most), nodes, DEFAULTS)
        assert sum(verdict.best or bool(verdict.shares) for verdict in limited.nodes) <= most
        counted = decide(wish(backends_per_pool=backends), nodes, DEFAULTS)
        if counted.plan is not None:
            lenders = {share.node_id for share in counted.plan.shares} - {""}
            assert len(lenders) == backends
            assert_respects(counted, nodes)


@pytest.mark.parametrize("batch", range(BATCHES // 4))
def test_less_context_is_given_only_where_it_is_allowed_and_never_less_than_fits(batch):
    for random in rounds(batch):
        nodes = random_clusters.cluster(random, most_nodes=4, most_layers=8)
        random_clusters.linked(random, nodes)
        defaults = replace(DEFAULTS, parallel=16, context_per_slot=8192)
        decision = decide(wish(), nodes, defaults)
        allowed = decide(wish(allow_reduced_context=True), nodes, defaults)
        if decision.plan is not None or allowed.plan is None:
            assert allowed == decision
            continue
        given = allowed.plan.context_per_slot
        assert allowed.reduced_context_from == 8192
        assert given < 8192
        assert_respects(allowed, nodes)
        assert decide(wish(), nodes, replace(defaults, context_per_slot=given + 1)).plan is None
