"""`/metrics` as Prometheus reads it, after requests over each front."""

import asyncio
import contextlib
import re
from pathlib import Path

import aiohttp
import pytest
from msgspec.structs import replace
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from sollol.errors import Reason, refuse
from sollol.report import Decision, DeviceShare

from sollold.front import http
from tests.fakes.fake_dispatcher import HELLO, MODEL, FakeCatalogue, FakeDispatcher, FakeStream
from tests.fakes.fake_keys import OPEN, admission_of, key_of, token_of
from tests.fakes.fake_metrics import NOTHING, counting, families, page_of, samples
from tests.placement_cases import node
from tests.pool_cluster import instance
from tests.sollold.test_gauges import facts

DOCUMENT = Path(__file__).parents[2] / "docs/metrics.md"
ASK = {"model": "tiny:latest", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture
async def serving(ports):
    async with contextlib.AsyncExitStack() as stack:

        async def start(answer=None, *, admission=OPEN, metrics=None, known=NOTHING):
            page = page_of(metrics or counting(), known)
            app = http.build_app(
                FakeDispatcher(answer), FakeCatalogue(MODEL), admission, page, max_body_bytes=1000, shutdown_grace_s=0.2
            )
            port = ports()
            stack.push_async_callback((await http.serve(app, "127.0.0.1", port)).cleanup)
            return await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{port}"))

        yield start


async def scraped(session, **headers):
    async with session.get("/metrics", headers=headers) as response:
        text = await response.text()
        assert response.status == 200, text
        return response, text


async def requests_of(session):
    _, text = await scraped(session)
    found = samples(families(text).values())
    return {key: value for key, value in found.items() if key.startswith("sollol_requests_total")}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_over_http_shows_with_its_tokens(serving, stream):
    session = await serving()
    async with session.post(CHAT, json={**ASK, "stream": stream}) as response:
        await response.read()
    response, text = await scraped(session)
    assert response.content_type == "text/plain"
    found = samples(families(text).values())
    assert found["sollol_requests_total{front=http,model=tiny,outcome=ok}"] == 1
    assert found["sollol_prompt_tokens_total{model=tiny}"] == 5
    assert found["sollol_generated_tokens_total{model=tiny}"] == 2
    assert found["sollol_time_to_first_token_seconds_count{model=tiny}"] == 1
    assert found["sollol_request_duration_seconds_sum{model=tiny}"] > 0


@pytest.mark.parametrize(
    ("answer", "body", "outcome"),
    [
        (refuse(Reason.NO_FIT, "too large"), ASK, "NO_FIT"),
        (FakeStream(chunks=HELLO[:2]), {**ASK, "stream": True}, "STREAM_TRUNCATED"),
        (FakeStream(chunks=HELLO[:2], error=RuntimeError("a bug")), ASK, "INTERNAL"),
    ],
    ids=["refused", "cut", "bug"],
)
async def test_a_request_that_fails_is_counted_by_its_reason(serving, answer, body, outcome):
    session = await serving(answer)
    async with session.post(CHAT, json=body) as response:
        await response.read()
    assert await requests_of(session) == {f"sollol_requests_total{{front=http,model=tiny,outcome={outcome}}}": 1}


async def test_what_is_no_request_for_an_answer_is_not_counted_and_a_bad_one_is(serving):
    session = await serving()
    for path in ("/v1/models", "/healthz", "/nowhere"):
        async with session.get(path) as response:
            await response.read()
    assert await requests_of(session) == {}
    async with session.post(CHAT, json={"model": "x" * 500}) as response:
        assert response.status == 400
    assert await requests_of(session) == {"sollol_requests_total{front=http,model=,outcome=INVALID_REQUEST}": 1}


async def test_the_page_wants_a_key_of_every_model_where_keys_are_needed(serving):
    metrics = counting()
    keys = (key_of("prometheus"), key_of("alice", models=("tiny",)), key_of("gone", revoked_unix_s=1.0))
    session = await serving(admission=admission_of(*keys, refused=metrics.key_refused), metrics=metrics)
    for name, status in ((None, 401), ("gone", 401), ("alice", 403)):
        headers = {"Authorization": f"Bearer {token_of(name)}"} if name else {}
        async with session.get("/metrics", headers=headers) as response:
            assert (response.status, "sollol_" in await response.text()) == (status, False)
    _, text = await scraped(session, Authorization=f"Bearer {token_of('prometheus')}")
    refused = {key: value for key, value in samples(families(text).values()).items() if "keys_refused" in key}
    assert refused == {
        "sollol_keys_refused_total{reason=KEY_MISSING}": 1,
        "sollol_keys_refused_total{reason=KEY_INVALID}": 1,
        "sollol_keys_refused_total{reason=KEY_SCOPE}": 1,
    }


async def everything(serving):
    """The page of a head to which everything has happened that is counted."""
    metrics = counting()
    await metrics.load("tiny", asyncio.sleep(0))
    metrics.placed(Decision(model="tiny", policy="fit", unit="ms/token", nodes=(), coordinator="a"))
    metrics.waited("tiny", 1.0)
    metrics.peer_refused(Reason.WRONG_ROLE)
    metrics.key_refused(Reason.KEY_INVALID)
    share = DeviceShare(device_id="CPU", layers=9, total_bytes=3, logged_bytes=2)
    pool = instance("p0", shares=(share,), predicted_ms_per_token=1.0, observed_ms_per_token=1.0)
    status = node("a", instances=(pool,))
    status = replace(status, report=replace(status.report, certificate_expires_in_s=9.0))
    known = facts(status, models=("tiny",), certificates_expire_in_s={"grpc": 9.0})
    session = await serving(metrics=metrics, known=known)
    async with session.post(CHAT, json=ASK) as response:
        await response.read()
    return session


async def test_the_documents_table_is_the_pages_own(serving):
    _, text = await scraped(await everything(serving))
    rows = []
    for name, family in families(text).items():
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        order = [label for label in family.samples[0].labels if label in labels]
        rows.append(f"| `{name}` | {family.type} | {', '.join(order)} | {family.documentation} |")
    documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `sollol_")]
    assert documented == rows


async def test_names_keep_to_prometheus_units_and_no_series_is_there_twice(serving):
    _, text = await scraped(await everything(serving))
    for name, family in families(text).items():
        assert re.fullmatch(r"sollol_[a-z_]+", name)
        assert (family.type == "counter") == name.endswith("_total")
        assert not re.search(r"_(ms|mb|kb|percent)(_|$)", name)
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(series) == len(set(series))


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=abc", "text/plain;version=", ";,=,;", "x/y"])
async def test_who_asks_for_what_is_no_form_gets_prometheus_own_text(serving, accept):
    response, _ = await scraped(await serving(), Accept=accept)
    assert response.content_type == "text/plain"


async def test_openmetrics_is_written_for_who_asks_for_it(serving):
    session = await everything(serving)
    response, text = await scraped(session, Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert response.content_type == "application/openmetrics-text"
    assert {family.name for family in text_string_to_metric_families(text)} == {
        name.removesuffix("_total") for name in families((await scraped(session))[1])
    }
