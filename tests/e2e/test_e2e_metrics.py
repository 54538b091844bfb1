"""`/metrics` of a real head with real agents and the real engine, read with Prometheus's own parser."""

import asyncio
import contextlib

import aiohttp
import pytest
from sollol.client import Client
from sollol.errors import Reason, SollolError
from sollol.inference import Message, Sampling

from agent.speed_meter import SETTLE_S
from tests.certificates import authority, write_identity
from tests.daemon import write_engine
from tests.e2e.cluster import chat_body
from tests.e2e.daemons import ByHand, short_home
from tests.e2e.models import RANDOM, RECITER
from tests.fakes.fake_metrics import families, samples
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
TOKENS = 64


async def page_of(cluster, key=""):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession() as session, session.get(f"{cluster.url}/metrics", headers=headers) as response:
        assert response.status == 200, await response.text()
        return samples(families(await response.text()).values())


def of(page, name, **labels):
    """The values of one series, by those of its labels that are not given."""
    wanted = {f"{label}={value}" for label, value in labels.items()}
    found = {}
    for series, value in page.items():
        series_name, _, rest = series.removesuffix("}").partition("{")
        said = set(rest.split(",")) if rest else set()
        if series_name == name and wanted <= said:
            found[",".join(sorted(said - wanted))] = value
    return found


async def test_a_load_and_requests_over_two_fronts_show_as_they_were(by_hand):
    by_hand.start_head()
    by_hand.start_agent("a")
    await by_hand.nodes_seen(1)
    cold = await page_of(by_hand)
    assert of(cold, "sollol_node_up") == {"node=a": 1}
    assert of(cold, "sollol_pools", model=RANDOM) == {"state=ready": 0, "state=loading": 0}
    assert of(cold, "sollol_device_free_bytes", node="a")["device=CPU,kind=CPU"] > 0

    await by_hand.say(RANDOM, max_tokens=TOKENS)
    status, _ = await by_hand.post("/v1/chat/completions", chat_body("nobody-has-this"))
    assert status == 404
    async with by_hand.client() as client:
        async for _ in client.chat(RANDOM, [Message("user", "hi")], Sampling(max_tokens=3)):
            pass

    page = await page_of(by_hand)
    assert of(page, "sollol_requests_total") == {
        f"front=http,model={RANDOM},outcome=ok": 1,
        "front=http,model=,outcome=MODEL_NOT_FOUND": 1,
        f"front=grpc,model={RANDOM},outcome=ok": 1,
    }
    assert of(page, "sollol_generated_tokens_total") == {f"model={RANDOM}": TOKENS + 3}
    assert of(page, "sollol_prompt_tokens_total")[f"model={RANDOM}"] > 0
    assert of(page, "sollol_loads_total") == {f"model={RANDOM},outcome=ok": 1}
    assert of(page, "sollol_placements_total") == {f"model={RANDOM},outcome=ok": 1}
    (load_s,) = of(page, "sollol_load_seconds_sum").values()
    (waited_s,) = of(page, "sollol_queue_wait_seconds_sum").values()
    (first_s,) = of(page, "sollol_time_to_first_token_seconds_sum").values()
    (took_s,) = of(page, "sollol_request_duration_seconds_sum").values()
    assert 0 < load_s <= waited_s <= first_s <= took_s
    assert of(page, "sollol_pools", model=RANDOM)["state=ready"] == 1
    (slots,) = of(page, "sollol_pool_slots", model=RANDOM, node="a", pool=0).values()
    assert slots >= 1


async def test_a_pool_shows_its_streams_its_memory_and_its_speed(by_hand):
    by_hand.start_head()
    by_hand.start_agent("a")
    await by_hand.nodes_seen(1)
    loop = asyncio.get_running_loop()
    await by_hand.say(RANDOM, max_tokens=1)
    settled_s = loop.time() + SETTLE_S
    async with by_hand.stream(RANDOM, max_tokens=4000) as events:
        await anext(aiter(events))
        page = await page_of(by_hand)
        assert of(page, "sollol_pool_active_streams", model=RANDOM) == {"node=a,pool=0": 1}

    async def cancelled():
        page = await page_of(by_hand)
        return of(page, "sollol_requests_total", outcome="CANCELLED") == {f"front=http,model={RANDOM}": 1}

    await wait_until(cancelled, within_s=10, what="a user who left is counted")
    await wait_until(lambda: loop.time() > settled_s, within_s=10, what="the pool has settled")

    async def observed():
        await by_hand.say(RANDOM, max_tokens=TOKENS)
        return of(await page_of(by_hand), "sollol_pool_observed_seconds_per_token", model=RANDOM)

    (seen_s,) = (await wait_until(observed, within_s=30, what="the agent reports what it observed")).values()
    page = await page_of(by_hand)
    (predicted_s,) = of(page, "sollol_pool_predicted_seconds_per_token", model=RANDOM).values()
    assert 0 < seen_s < 60
    assert 0 < predicted_s < 60
    errors = of(page, "sollol_pool_memory_error_ratio", model=RANDOM, node="a", pool=0)
    assert list(errors) == ["device=CPU,device_node=a"]
    assert abs(errors["device=CPU,device_node=a"]) < 1


@pytest.fixture
async def secured(models_dir, ports):
    with short_home() as home:
        ours = authority()
        cluster = ByHand(home, ports, models=models_dir, engine=write_engine(home / "engine"))
        cluster.tls_dir = write_identity(home / "pki/admin", ours, "admin", "operator")
        cluster.client_dir = write_identity(home / "pki/client", ours, "client", "someone")
        node, head = (
            write_identity(home / f"pki/{role}", ours, role, name, days=days)
            for role, name, days in (("agent", "n1", 30), ("head", "h", 10))
        )
        try:
            cluster.start_redis()
            cluster.start_agent("n1", "--tls-dir", str(node))
            cluster.start_head("--tls-dir", str(head))
            await cluster.nodes_seen(1)
            yield cluster
        finally:
            cluster.close()


async def test_certificates_refused_peers_and_refused_keys_show_and_the_page_wants_a_key(secured):
    async with Client(secured.head, tls_dir=secured.client_dir) as client:
        with pytest.raises(SollolError) as refused:
            await client.nodes()
    assert refused.value.refusal.reason is Reason.WRONG_ROLE
    page = await page_of(secured)
    day_s = 86_400
    assert 9 * day_s < of(page, "sollol_certificate_expires_in_seconds")["use=grpc"] <= 10 * day_s
    assert 29 * day_s < of(page, "sollol_node_certificate_expires_in_seconds")["node=n1"] <= 30 * day_s
    assert of(page, "sollol_peers_refused_total") == {"reason=WRONG_ROLE": 1}

    status, key, err = await secured.cli("keys", "add", "prometheus")
    assert status == 0, err
    with contextlib.suppress(AssertionError):
        await page_of(secured, "sk-sollol-guess")
        pytest.fail("the page was shown to a key that nobody has made")
    status, _ = await secured.post("/v1/chat/completions", chat_body(RECITER))
    assert status == 401
    page = await page_of(secured, key.strip())
    assert of(page, "sollol_keys_refused_total") == {"reason=KEY_INVALID": 1, "reason=KEY_MISSING": 1}
    assert of(page, "sollol_requests_total") == {"front=http,model=,outcome=KEY_MISSING": 1}
