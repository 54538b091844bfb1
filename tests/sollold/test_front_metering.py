import asyncio
import contextlib

import pytest
from sollol.errors import Reason, SollolError, refuse

from sollold.front.metering import Tally
from sollold.front.opening import ProgressBoard, opened
from sollold.streams import EngineRequest
from tests.fakes.fake_dispatcher import DONE, HELLO, HELLO_TEXT, USAGE, FakeDispatcher, FakeStream, chat_frame
from tests.fakes.fake_keys import admission_of, key_of, token_of
from tests.fakes.fake_metrics import counting

ASK = EngineRequest(model="tiny", path="/v1/chat/completions", body=b"x" * 400)  # 100 tokens, by its size
TIMINGS = {"cache_n": 3, "prompt_n": 4, "prompt_ms": 1.5, "predicted_n": 5}
LAST = chat_frame({}, "stop", timings=TIMINGS)


def counted(*chunks: bytes) -> int:
    tally = Tally(ASK)
    for chunk in chunks:
        tally.feed(chunk)
    tally.settle()
    return tally.charged


@pytest.mark.parametrize(
    ("chunks", "tokens"),
    [
        (HELLO, 7),
        ((b"".join(HELLO),), 7),
        (HELLO_TEXT, 6),
        ((HELLO[1], LAST, DONE), 12),
        ((HELLO[1] + LAST, DONE), 12),
        ((HELLO[1] + LAST + DONE,), 12),
        ((HELLO[1], LAST[:9], LAST[9:], DONE), 12),
        ((HELLO[1], HELLO[2]), 102),
        ((HELLO[1], LAST[:40]), 102),
        ((HELLO[1], b": comment\n\n"), 101),
        ((), 100),
    ],
)
def test_a_stream_costs_what_the_engine_counted_or_else_its_frames_and_the_size_of_its_prompt(chunks, tokens):
    assert counted(*chunks) == tokens


def test_settling_twice_charges_once():
    tally = Tally(ASK)
    tally.feed(USAGE + DONE)
    assert tally.settle() == 7 - 102
    assert tally.settle() == 0


class Meter:
    """A key with 1000 tokens a minute and a clock that stands; `used` is what its requests have cost."""

    def __init__(self):
        self.admission = admission_of(key_of("alice", tokens_per_minute=1000), clock=lambda: 0.0)

    def permit(self):
        return self.admission.admit(token_of("alice"), "tiny")

    @property
    def used(self):
        (use,) = self.admission._uses.values()
        return 1000 - use.allowance._level

    @property
    def running(self):
        (use,) = self.admission._uses.values()
        return use.running


@pytest.fixture
def meter():
    return Meter()


def opening(dispatcher, permit, account=None):
    return opened(dispatcher, ASK, ProgressBoard(), permit, account or counting().request("http"))


async def test_a_whole_stream_costs_its_usage_and_passes_unchanged(meter):
    dispatcher = FakeDispatcher(FakeStream(chunks=HELLO))
    async with opening(dispatcher, meter.permit()) as opened_:
        stream = await opened_
        assert [chunk async for chunk in stream] == list(HELLO)
        assert (stream.node_id, stream.instance_id, stream.model, stream.status) == ("node-a", "pool-0", "tiny", 200)
    assert (meter.used, meter.running) == (7, 0)
    assert dispatcher.answer.closed
    assert dispatcher.requests[0].asker == "alice"


async def test_a_running_stream_is_paid_for_as_it_goes(meter):
    async with opening(FakeDispatcher(FakeStream(chunks=HELLO)), meter.permit()) as opened_:
        used = [meter.used async for _ in await opened_]
    assert used == [101, 102, 103, 104, 105, 7]


async def test_a_key_is_free_for_its_next_request_when_the_end_of_this_one_leaves(meter):
    async with opening(FakeDispatcher(FakeStream(chunks=HELLO)), meter.permit()) as opened_:
        running = [meter.running async for _ in await opened_]
    assert running == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("cut", range(1, len(DONE)))
async def test_wherever_the_end_is_cut_its_key_is_free_and_charged_as_the_engine_counted(meter, cut):
    chunks = (*HELLO[:-1], DONE[:cut], DONE[cut:])
    async with opening(FakeDispatcher(FakeStream(chunks=chunks)), meter.permit()) as opened_:
        seen = [(meter.running, meter.used) async for _ in await opened_]
    assert [running for running, _ in seen] == [1] * len(HELLO) + [0]
    assert seen[-1] == (0, 7)


async def test_whoever_leaves_early_has_paid_for_what_was_sent(meter):
    async with (
        opening(FakeDispatcher(FakeStream(chunks=HELLO)), meter.permit()) as opened_,
        contextlib.aclosing(aiter(await opened_)) as chunks,
    ):
        await anext(chunks)
        await anext(chunks)
    assert (meter.used, meter.running) == (102, 0)


async def test_whoever_leaves_while_the_prompt_is_read_has_paid_for_it(meter):
    entered = asyncio.Event()

    async def reading(_request, _on_progress):
        entered.set()
        await asyncio.Event().wait()

    async with opening(FakeDispatcher(reading), meter.permit()):
        await asyncio.wait_for(entered.wait(), 5)
    assert (meter.used, meter.running) == (100, 0)


async def test_whoever_leaves_while_it_waits_for_its_turn_has_paid_nothing(meter):
    entered = asyncio.Event()

    async def waiting(_request, _on_progress):
        entered.set()
        await asyncio.Event().wait()

    async with opening(FakeDispatcher(waiting, queues=True), meter.permit()):
        await asyncio.wait_for(entered.wait(), 5)
        assert meter.used == 100, "those that wait count, so that no key has too many of them"
    assert (meter.used, meter.running) == (0, 0)


@pytest.mark.parametrize(
    "answer", [refuse(Reason.QUEUE_FULL, "full"), FakeStream(status=400, chunks=(b'{"error": {"message": "no"}}',))]
)
async def test_a_refused_request_costs_nothing(meter, answer):
    async with opening(FakeDispatcher(answer), meter.permit()) as opened_:
        with contextlib.suppress(SollolError):
            async for _ in await opened_:
                pass
    assert (meter.used, meter.running) == (0, 0)


async def test_a_stream_that_breaks_costs_what_was_sent(meter):
    broken = FakeStream(chunks=HELLO[:3], error=refuse(Reason.ENGINE_DIED, "died"))
    async with opening(FakeDispatcher(broken), meter.permit()) as opened_:
        with pytest.raises(SollolError, match="died"):
            async for _ in await opened_:
                pass
    assert (meter.used, meter.running) == (103, 0)


@pytest.mark.parametrize(
    ("stream", "tokens"),
    [
        (FakeStream(chunks=HELLO), (5, 2)),
        (FakeStream(chunks=(HELLO[1], LAST, DONE)), (7, 5)),
        (FakeStream(chunks=HELLO[:3], error=refuse(Reason.ENGINE_DIED, "died")), (100, 3)),
        (FakeStream(status=400, chunks=(b'{"error": {"message": "no"}}',)), (0, 0)),
    ],
    ids=["usage", "timings", "cut", "refused"],
)
async def test_the_account_of_a_request_without_a_key_hears_of_its_tokens_too(stream, tokens):
    account = counting().request("http")
    permit = admission_of().admit(None, "tiny")
    async with opening(FakeDispatcher(stream), permit, account) as opened_:
        with contextlib.suppress(SollolError):
            async for _ in await opened_:
                pass
    assert (account.prompt_tokens, account.generated_tokens) == tokens
    assert (account.first_s is not None) == any(tokens)
