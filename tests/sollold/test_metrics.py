import asyncio
import contextlib

import pytest
from sollol.errors import Reason, refuse
from sollol.report import Decision

from sollold.metrics import Metrics
from sollold.numbers import GaveWayError
from tests.fakes.fake_metrics import KNOWN, counting, samples

DIED = refuse(Reason.ENGINE_DIED, "died")


def counted(metrics, prefix=""):
    """What is above 0; histograms by their sums and counts."""
    found = samples(metrics.collect())
    return {key: value for key, value in found.items() if key.startswith(prefix) and value and "_bucket" not in key}


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_request_is_counted_once_it_has_ended_under_the_models_own_name():
    clock = Clock()
    metrics = Metrics(KNOWN.get, clock=clock)
    account = metrics.request("http")
    account.model = "tiny:latest"
    clock.now_s += 2
    account.began()
    clock.now_s += 5
    account.prompt_tokens, account.generated_tokens = 11, 7
    assert counted(metrics) == {}

    account.end(None)

    assert counted(metrics) == {
        "sollol_requests_total{front=http,model=tiny,outcome=ok}": 1,
        "sollol_prompt_tokens_total{model=tiny}": 11,
        "sollol_generated_tokens_total{model=tiny}": 7,
        "sollol_time_to_first_token_seconds_sum{model=tiny}": 2,
        "sollol_time_to_first_token_seconds_count{model=tiny}": 1,
        "sollol_request_duration_seconds_sum{model=tiny}": 7,
        "sollol_request_duration_seconds_count{model=tiny}": 1,
    }


def test_a_refused_request_has_no_time_and_what_is_no_model_is_no_label():
    metrics = counting()
    for name in ("", "nobody has this", "nor\nthis"):
        account = metrics.request("mqtt")
        account.model = name
        account.end(Reason.MODEL_NOT_FOUND)
    assert counted(metrics) == {"sollol_requests_total{front=mqtt,model=,outcome=MODEL_NOT_FOUND}": 3}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (DIED, "ENGINE_DIED"),
        (asyncio.CancelledError(), "CANCELLED"),
        (GeneratorExit(), "CANCELLED"),
        (RuntimeError("a bug"), "INTERNAL"),
    ],
    ids=str,
)
def test_how_a_block_ends_is_the_outcome_of_its_request(error, outcome):
    metrics = counting()
    with contextlib.suppress(BaseException), metrics.requested("grpc") as account:
        account.model = "tiny"
        if error is not None:
            raise error
    assert counted(metrics) == {f"sollol_requests_total{{front=grpc,model=tiny,outcome={outcome}}}": 1}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (DIED, "ENGINE_DIED"),
        (GaveWayError("to another"), "gave_way"),
        (asyncio.CancelledError(), "STOPPED"),
        (RuntimeError("a bug"), "INTERNAL"),
    ],
    ids=str,
)
async def test_a_load_that_fails_is_counted_by_why_and_its_error_goes_on(error, outcome):
    async def loading():
        raise error

    metrics = counting()
    with pytest.raises(type(error)):
        await metrics.load("tiny", loading())
    assert counted(metrics) == {f"sollol_loads_total{{model=tiny,outcome={outcome}}}": 1}


async def test_a_load_that_succeeds_is_timed():
    clock = Clock()
    metrics = Metrics(KNOWN.get, clock=clock)

    async def loading():
        clock.now_s += 40
        return "pool"

    assert await metrics.load("tiny", loading()) == "pool"
    assert counted(metrics) == {
        "sollol_loads_total{model=tiny,outcome=ok}": 1,
        "sollol_load_seconds_sum{model=tiny}": 40,
        "sollol_load_seconds_count{model=tiny}": 1,
    }


def test_decisions_waits_and_refusals_are_counted():
    metrics = counting()
    made = {"policy": "fit", "unit": "ms/token", "nodes": ()}
    metrics.placed(Decision(model="tiny", coordinator="a", **made))
    metrics.placed(Decision(model="tiny", refusal=refuse(Reason.NO_FIT, "too large").refusal, **made))
    metrics.waited("tiny", 1.5)
    metrics.peer_refused(Reason.WRONG_ROLE)
    metrics.key_refused(Reason.KEY_INVALID)
    assert counted(metrics) == {
        "sollol_placements_total{model=tiny,outcome=ok}": 1,
        "sollol_placements_total{model=tiny,outcome=NO_FIT}": 1,
        "sollol_queue_wait_seconds_sum{model=tiny}": 1.5,
        "sollol_queue_wait_seconds_count{model=tiny}": 1,
        "sollol_peers_refused_total{reason=WRONG_ROLE}": 1,
        "sollol_keys_refused_total{reason=KEY_INVALID}": 1,
    }
