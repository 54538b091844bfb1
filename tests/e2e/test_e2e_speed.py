"""What an answer shows of a model's speed is what the next placement counts with."""

import asyncio
import json

import pytest
from sollol.report import PlacementWish

from agent.speed_meter import SETTLE_S
from tests.e2e.models import RANDOM
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
TOKENS = 64


async def report_of(cluster, node):
    async with cluster.client() as client:
        found = [status.report for status in await client.nodes() if status.report.node_id == node and status.connected]
    return found[0] if found else None


async def observed(cluster):
    report = await report_of(cluster, "a")
    return report.speeds if report is not None else ()


async def placed(cluster, backends):
    words = ("place", RANDOM, "--max-nodes", "1", "--backends-per-pool", str(backends))
    status, text, errors = await cluster.cli(*words)
    assert status == 0, errors
    _, record, _ = await cluster.cli(*words, "--json")
    return text, json.loads(record)


@pytest.mark.parametrize("backends", [0, 1], ids=["alone", "through-a-backend"])
async def test_one_answer_corrects_the_next_placement_also_after_a_restart(by_hand, backends):
    by_hand.start_head()
    by_hand.start_agent("a")
    await by_hand.nodes_seen(1)
    text, before = await placed(by_hand, backends)
    assert "observed" not in text
    loop = asyncio.get_running_loop()
    async with by_hand.client() as client:
        pool = await client.load(PlacementWish(model=RANDOM, max_nodes=1, backends_per_pool=backends))
    settled_s = loop.time() + SETTLE_S
    assert pool.instance.predicted_ms_per_token == pytest.approx(before["plan"]["predicted_ms_per_token"])

    await by_hand.say(RANDOM, max_tokens=TOKENS)  # in its first seconds
    await wait_until(lambda: loop.time() > settled_s, what="the pool has settled")
    await by_hand.say(RANDOM, max_tokens=TOKENS)

    (found,) = await wait_until(lambda: observed(by_hand), what="the agent reports what it observed")
    assert found.tokens == TOKENS
    assert found.devices == (("CPU x1",) if backends == 0 else ("a/CPU x1",))
    text, after = await placed(by_hand, backends)
    best = next(node for node in after["nodes"] if node["best"])
    assert f"observed on this plan {found.ms_per_token:.3f}" in text
    assert best["score"] == pytest.approx(found.ms_per_token)
    assert best["score"] == pytest.approx(sum(best["parts"].values()))
    _, table, _ = await by_hand.cli("pools")
    assert f"{found.ms_per_token:.1f} / {found.predicted_ms_per_token:.1f}" in table

    by_hand.processes["a"].terminate()
    await asyncio.to_thread(by_hand.processes["a"].wait, 20)
    by_hand.start_agent("a")
    assert await wait_until(lambda: observed(by_hand), within_s=10, what="it is still known") == (found,)
