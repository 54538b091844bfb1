"""Requests over a real broker, answered by a scripted dispatcher."""

import asyncio
import contextlib
import json
import os
import signal

import pytest
from sollol.broker import broker_of
from sollol.errors import Reason, refuse
from sollol.inference import Progress
from sollol.mqtt import Connection
from sollol.topics import Topics

from sollold.front.mqtt import MqttFront
from tests.fakes.fake_dispatcher import HELLO, FakeDispatcher, FakeStream
from tests.fakes.fake_keys import OPEN, admission_of, key_of, token_of
from tests.fakes.fake_metrics import counting, samples
from tests.waiting import wait_until

TOPICS = Topics("home")
GENERATE, CANCEL = "sollol/v1/home/generate", "sollol/v1/home/generate/cancel"
REPLY = "reply/esp32"
PROMPT = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})


def link_to(broker, name):
    found = broker_of(broker.url, password_file="", ca_file="")
    return Connection(found, client_id=name, status_topic=f"sollol/v1/home/head/{name}/status")


def _ended(messages):
    return messages if messages and messages[-1].get("done") else None


class Device:
    """Hears the answers, with their correlation data."""

    def __init__(self, broker, link):
        self._broker = broker
        self.heard = []
        link.subscribe(REPLY, self.heard.append)

    async def ask(self, payload=PROMPT, *words, correlation="7", topic=GENERATE, reply=REPLY):
        if reply:
            words = ("-D", "publish", "response-topic", reply, *words)
        if correlation:
            words = ("-D", "publish", "correlation-data", correlation, *words)
        await self._broker.publish(topic, payload, *words)

    def messages(self, correlation=b"7"):
        return [json.loads(message.payload) for message in self.heard if message.correlation == correlation]

    async def done(self, correlation=b"7"):
        """Every message up to the last one."""

        messages = await wait_until(lambda: _ended(self.messages(correlation)), within_s=10, what="a last message")
        assert [message["sequence"] for message in messages] == list(range(len(messages)))
        return messages

    async def refused(self, correlation=b"7"):
        return (await self.done(correlation))[-1]["error"]


@pytest.fixture
async def serving(broker):
    """Start a head's front and get a device; `front.close` is the head's end."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(answer=None, *, name="h", admission=OPEN, most_running=4, max_bytes=10_000, metrics=None):
            dispatcher, link = FakeDispatcher(answer), link_to(broker, name)
            front = MqttFront(
                link,
                dispatcher,
                admission,
                metrics or counting(),
                topics=TOPICS,
                most_running=most_running,
                max_bytes=max_bytes,
                discovery_prefix="homeassistant",
                grace_s=0.2,
            )
            device_link = link_to(broker, f"device-of-{name}")
            device = Device(broker, device_link)
            heard = await broker.listen("sollol/v1/home/head/+/status")
            for each in (link, device_link):
                task = asyncio.create_task(each.run())
                stack.push_async_callback(asyncio.wait, {task}, timeout=5)
                stack.callback(task.cancel)
            stack.push_async_callback(front.close)
            for each in (name, f"device-of-{name}"):
                await heard.says(f"sollol/v1/home/head/{each}/status", "online")
            return dispatcher, device, front

        yield start


async def test_a_device_gets_the_answer_piece_by_piece_and_then_the_usage(serving):
    dispatcher, device, _ = await serving()
    await device.ask()
    *chunks, last = await device.done()
    assert [chunk["text"] for chunk in chunks] == ["Hel", "lo ✓"]
    assert (last["finish_reason"], last["usage"]) == ("stop", {"prompt_tokens": 5, "completion_tokens": 2})
    assert dispatcher.answer.closed


async def test_a_device_hears_what_its_request_waits_for(serving):
    ready = asyncio.Event()

    async def slow(_request, on_progress):
        on_progress(Progress(state="loading", percent=40.0))
        await ready.wait()
        return FakeStream()

    _, device, _ = await serving(slow)
    await device.ask()
    await wait_until(device.messages, what="told")
    ready.set()
    assert (await device.done())[0]["progress"] == {"state": "loading", "percent": 40.0}


async def test_bad_requests_get_one_last_message_that_says_why(serving):
    _, device, _ = await serving(max_bytes=200)
    await device.ask('{"model": "tiny"}', correlation="1")
    await device.ask('{"model": "tiny", "prompt": "x", "top_p": 7}', correlation="2")
    await device.ask("x" * 300, correlation="3")
    assert (await device.refused(b"1"))["reason"] == "INVALID_REQUEST"
    assert (await device.refused(b"2"))["param"] == "top_p"
    assert (await device.refused(b"3"))["reason"] == "REQUEST_TOO_LARGE"


async def test_a_refusal_of_the_dispatcher_reaches_the_device_with_when_to_come_back(serving):
    _, device, _ = await serving(refuse(Reason.NO_FIT, "no room", retryable=True, retry_after_s=3))
    await device.ask()
    error = await device.refused()
    assert (error["reason"], error["message"], error["retry_after_s"]) == ("NO_FIT", "no room", 3)


@pytest.mark.parametrize(
    "reply",
    ["", "sollol/v1/home/node/a/status", "$SYS/x", "homeassistant/device/x/config"],
    ids=lambda reply: reply or "none",
)
async def test_a_request_whose_answer_has_nowhere_to_go_is_dropped_and_counted(serving, reply):
    dispatcher, device, front = await serving()
    await device.ask(reply=reply)
    await device.ask(correlation="8")
    await device.done(b"8")
    assert len(dispatcher.requests) == 1
    assert front._dropped == 1


async def test_a_retained_request_is_not_answered_by_every_head_that_starts(serving, broker):
    await broker.publish(GENERATE, PROMPT, "-r", "-D", "publish", "response-topic", REPLY)
    dispatcher, device, _ = await serving()
    await device.ask()
    await device.done()
    assert len(dispatcher.requests) == 1


async def test_more_than_the_limit_are_refused_with_when_to_come_back(serving):
    stream = FakeStream(chunks=HELLO[:2], hangs=True)
    _, device, _ = await serving(stream, most_running=1)
    await device.ask(correlation="1")
    await wait_until(lambda: device.messages(b"1"), what="the first runs")
    await device.ask(correlation="2")
    error = await device.refused(b"2")
    assert (error["reason"], error["retry"], error["retry_after_s"]) == ("QUEUE_FULL", "RETRYABLE", 5.0)


async def test_a_cancelled_request_frees_its_stream_and_gets_a_last_message(serving):
    stream = FakeStream(chunks=HELLO[:2], hangs=True)
    _, device, _ = await serving(stream)
    await device.ask()
    await wait_until(device.messages, what="it runs")
    await device.ask("", topic=CANCEL, correlation="other")
    await device.ask('{"model": "tiny"}', correlation="8")
    await device.refused(b"8")  # so that the cancellation before it has been heard, too
    assert (_ended(device.messages()), stream.closed) == (None, False), "another one's cancellation is none of its"
    await device.ask("", topic=CANCEL)
    assert (await device.refused())["reason"] == "CANCELLED"
    assert stream.closed


async def test_whoever_cancels_when_the_last_message_is_on_its_way_gets_no_other_last_one(serving, monkeypatch):
    _, device, front = await serving()
    send, handed_over = front._connection.send, asyncio.Event()

    async def unconfirmed(publication):
        await send(publication)
        if json.loads(publication.payload).get("done"):
            handed_over.set()
            await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr(front._connection, "send", unconfirmed)
        await device.ask()
        await asyncio.wait_for(handed_over.wait(), 5)
        await device.ask("", topic=CANCEL)
        await wait_until(lambda: not front._running, what="the request is over")
    await device.ask(correlation="8")
    await device.done(b"8")
    assert [message["sequence"] for message in device.messages() if message.get("done")] == [2]


async def test_a_request_that_comes_twice_while_it_runs_is_answered_once(serving):
    stream = FakeStream(chunks=HELLO[:2], hangs=True)
    dispatcher, device, front = await serving(stream)
    await device.ask()
    await wait_until(device.messages, what="it runs")
    await device.ask()
    await wait_until(lambda: front._dropped, what="the second is dropped")
    assert len(dispatcher.requests) == 1


async def test_keys_hold_as_they_do_over_http(serving):
    keys = key_of("tiny-only", models=("tiny",)), key_of("none", models=("x",))
    admission = admission_of(*keys, known={"tiny": "tiny"})
    _, device, _ = await serving(admission=admission)

    def with_key(name):
        return "-D", "publish", "user-property", "api_key", token_of(name)

    await device.ask(correlation="1")
    await device.ask(PROMPT, *with_key("wrong"), correlation="2")
    await device.ask(PROMPT, *with_key("none"), correlation="3")
    await device.ask(PROMPT, *with_key("tiny-only"), correlation="4")
    refused = [await device.refused(correlation) for correlation in (b"1", b"2", b"3")]
    assert [said["reason"] for said in refused] == ["KEY_MISSING", "KEY_INVALID", "KEY_SCOPE"]
    assert "as the user property `api_key`" in refused[0]["message"]
    assert (await device.done(b"4"))[-1]["finish_reason"] == "stop"


async def test_a_keys_own_limit_counts_requests_over_mqtt_until_they_end(serving):
    admission = admission_of(key_of("one", concurrency=1))
    dispatcher, device, _ = await serving(FakeStream(chunks=HELLO[:2], hangs=True), admission=admission)
    body = json.dumps({**json.loads(PROMPT), "api_key": token_of("one")})
    await device.ask(body, correlation="1")
    await wait_until(lambda: device.messages(b"1"), what="the first runs")
    await device.ask(body, correlation="2")
    assert (await device.refused(b"2"))["reason"] == "KEY_CONCURRENCY"
    await device.ask("", topic=CANCEL, correlation="1")
    await device.done(b"1")
    dispatcher.answer = FakeStream()
    await device.ask(body, correlation="3")
    assert (await device.done(b"3"))[-1]["finish_reason"] == "stop"


async def test_two_heads_share_the_requests_and_one_that_leaves_takes_no_more(serving):
    one, device, front = await serving(most_running=20)
    other, _, _ = await serving(name="g", most_running=20)
    for number in range(10):
        await device.ask(correlation=f"a{number}")
    for number in range(10):
        await device.done(f"a{number}".encode())
    assert len(one.requests) + len(other.requests) == 10
    assert one.requests
    assert other.requests

    before = len(one.requests)
    await front.close()
    for number in range(4):
        await device.ask(correlation=f"b{number}")
        await device.done(f"b{number}".encode())
    assert len(one.requests) == before


async def test_a_request_that_runs_when_the_head_ends_is_told_so(serving):
    stream = FakeStream(chunks=HELLO[:2], hangs=True)
    _, device, front = await serving(stream)
    await device.ask()
    await wait_until(device.messages, what="it runs")
    await front.close()
    error = await device.refused()
    assert (error["reason"], error["retry"]) == ("SHUTTING_DOWN", "RETRYABLE")
    assert stream.closed


async def test_a_broker_that_goes_away_ends_the_stream_and_a_word_waits_for_when_it_is_back(
    serving, broker, monkeypatch
):
    monkeypatch.setattr("sollol.mqtt_client.ANSWER_WITHIN_S", 2.0)
    more = asyncio.Event()

    class Stream(FakeStream):
        async def __aiter__(self):
            for chunk in HELLO[:2]:
                yield chunk
            await more.wait()
            for chunk in HELLO[2:]:
                yield chunk

    stream = Stream()
    _, device, front = await serving(stream)
    await device.ask()
    await wait_until(device.messages, what="it runs")
    broker.stop()
    more.set()
    await wait_until(lambda: stream.closed, within_s=10, what="the engine's slot is free")
    waiting = json.loads(front._connection._outbox.take().payload)
    assert (waiting["done"], waiting["error"]["reason"]) == (True, "BROKER_UNREACHABLE")


async def test_a_broker_that_restarts_while_a_model_loads_costs_no_answer(serving, broker, monkeypatch):
    monkeypatch.setattr("sollold.front.mqtt.PROGRESS_GAP_S", 0.0)
    ready, online = asyncio.Event(), "sollol/v1/home/head/+/status"
    told = 0

    async def slow(_request, on_progress):
        nonlocal told
        while not ready.is_set():
            told += 1
            on_progress(Progress(state="loading", percent=told / 100))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ready.wait(), 0.02)
        return FakeStream()

    _, device, _ = await serving(slow)
    await device.ask()
    await wait_until(device.messages, what="it waits")
    broker.stop()
    while_away = told + 3
    await wait_until(lambda: told > while_away, what="the load goes on")
    await broker.start()
    heard = await broker.listen(online)
    for name in ("h", "device-of-h"):
        await heard.says(online.replace("+", name), "online")
    ready.set()
    *messages, last = await wait_until(lambda: _ended(device.messages()), within_s=10, what="a last message")
    assert last["finish_reason"] == "stop"
    assert "".join(message.get("text", "") for message in messages) == "Hello ✓"
    assert last["sequence"] > len(messages), "what the broker missed is missing"


async def test_a_broker_that_takes_nothing_stops_the_engine_and_not_the_head(serving, broker):
    taken = 0

    class Endless(FakeStream):
        async def __aiter__(self):
            nonlocal taken
            while True:
                taken += 1
                yield HELLO[1]
                await asyncio.sleep(0)

    _, device, _ = await serving(Endless())
    await device.ask()
    await wait_until(lambda: len(device.messages()) > 10, what="it runs")
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        before = taken
        for _ in range(1000):  # turns of the loop, in which an engine that nothing held would say a thousand pieces
            await asyncio.sleep(0)
        assert taken - before <= 2
    finally:
        os.kill(broker.pid, signal.SIGCONT)
    await device.ask("", topic=CANCEL)
    await device.done()


async def test_every_request_is_counted_by_how_it_ended(serving):
    """One that is answered, one that the gate refuses, one that there is nobody to tell of."""
    metrics = counting()
    keys = admission_of(key_of("esp32"))
    _, device, _ = await serving(admission=keys, metrics=metrics)
    await device.ask(PROMPT, "-D", "publish", "user-property", "api_key", token_of("esp32"), correlation="1")
    await device.done(b"1")
    await device.ask(correlation="2")
    await device.refused(b"2")
    await device.ask(reply="", correlation="3")
    counted = {"ok": ("tiny", 1), "KEY_MISSING": ("tiny", 1), "INVALID_REQUEST": ("", 1)}

    def all_counted():
        found = {key: value for key, value in samples(metrics.collect()).items() if "_requests_total" in key}
        return found == {
            f"sollol_requests_total{{front=mqtt,model={model},outcome={outcome}}}": value
            for outcome, (model, value) in counted.items()
        }

    await wait_until(all_counted, within_s=10, what="all three are counted")
