"""The connection to a real Mosquitto: presence, what a lost broker costs, and what it never costs."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
import time

import pytest
import structlog
from aiomqtt import MqttError
from sollol import log as logging
from sollol import mqtt as module
from sollol.broker import broker_of
from sollol.mqtt import Connection
from sollol.mqtt_client import WILL_DELAY_S, heeding
from sollol.mqtt_outbox import Publication

from tests.broker import PASSWORD, USER
from tests.cpu import cost
from tests.waiting import wait_until

STATUS = "sollol/v1/home/node/a/status"


def connection(broker, *, url="", client_id="sollol-agent/a", **options):
    found = broker_of(url or broker.url, password_file="", ca_file="")
    return Connection(found, client_id=client_id, status_topic=STATUS, **options)


@contextlib.asynccontextmanager
async def running(link):
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled(), "it leaves when it is told to"


def state(value, topic="sollol/v1/home/node/a/state", **more):
    return Publication(topic=topic, payload=json.dumps(value).encode(), retain=True, **more)


@pytest.fixture
def log_lines(tmp_path):
    with (tmp_path / "log").open("w+") as stream:
        logging.configure("info", "json", stream=stream)
        yield lambda: [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        structlog.reset_defaults()  # a level left behind would silence the logs that other tests look at


async def test_presence_is_retained_while_it_runs_and_offline_at_once_when_it_ends(broker):
    async with running(connection(broker)):
        heard = await broker.listen(STATUS)
        await heard.says(STATUS, "online")
        begun = time.monotonic()
    await heard.says(STATUS, "offline")
    assert time.monotonic() - begun < 5
    late = await broker.listen(STATUS)
    assert late.messages[0] == (True, STATUS, "offline")


KILLED = """
import asyncio, sys
from sollol import mqtt_client
from sollol.broker import broker_of
from sollol.mqtt import Connection
mqtt_client.WILL_DELAY_S = int(sys.argv[3])
broker = broker_of(sys.argv[1], password_file="", ca_file="")
asyncio.run(Connection(broker, client_id=sys.argv[2], status_topic=sys.argv[2]).run())
"""


@contextlib.asynccontextmanager
async def killed_once_online(broker, heard, topic=STATUS, will_delay_s=WILL_DELAY_S):
    argv = (sys.executable, "-c", KILLED, broker.url, topic, str(will_delay_s))
    child = await asyncio.create_subprocess_exec(*argv)
    try:
        await heard.says(topic, "online", within_s=10)
    finally:
        child.kill()
        await child.wait()
    yield


async def test_a_killed_process_is_offline_within_three_seconds(broker):
    heard = await broker.listen(STATUS)
    async with killed_once_online(broker, heard):
        await heard.says(STATUS, "offline", within_s=3)


async def test_who_comes_back_before_the_will_is_due_was_never_offline(broker):
    other = "sollol/v1/home/node/b/status"
    heard = await broker.listen(STATUS, other)
    delay_s = 5  # so that also a busy machine is back before it is over
    async with (
        killed_once_online(broker, heard, will_delay_s=delay_s),
        running(connection(broker, client_id=STATUS)),
    ):
        await wait_until(lambda: heard.on(STATUS) == ["online", "online"], what="it is back")
        async with killed_once_online(broker, heard, other, delay_s):
            await heard.says(other, "offline", within_s=20)  # a will that was due later than the first one's
        assert heard.on(STATUS) == ["online", "online"]


async def test_a_broker_that_comes_back_empty_hears_presence_and_state_again_at_once(broker):
    link = connection(broker)
    async with running(link):
        link.publish(state({"free_bytes": 1}))
        link.publish(state({"free_bytes": 2}))
        first = await broker.listen("sollol/#")
        await first.says("sollol/v1/home/node/a/state", '{"free_bytes": 2}')

        broker.stop()
        link.publish(state({"pool": 1}, topic="sollol/v1/home/pool/p/state"))
        await broker.start()

        again = await broker.listen("sollol/#")
        await again.says(STATUS, "online", within_s=3)
        await again.says("sollol/v1/home/node/a/state", '{"free_bytes": 2}')
        await again.says("sollol/v1/home/pool/p/state", '{"pool": 1}')


async def test_what_a_broker_that_is_down_misses_is_sent_later_and_nobody_waits(new_broker, log_lines):
    broker = new_broker()
    link = connection(broker)
    async with running(link):
        await wait_until(log_lines, what="it complains")
        with cost() as publishing:
            for number in range(1000):
                link.publish(Publication(topic="sollol/v1/home/event", payload=b"%d" % number))
        assert publishing.cpu_s < 0.5
        await broker.start()
        heard = await broker.listen("sollol/#")
        await heard.says(STATUS, "online", within_s=15)
        await wait_until(lambda: "'sollol/v1/home/event'" in broker.log, what="events are sent")

    lost = [line for line in log_lines() if line["event"] == "mqtt_lost"]
    assert [line["reason"] for line in lost] == ["BROKER_UNREACHABLE"], "once, however often it tries"
    assert "refused" in lost[0]["problem"]


async def test_a_broker_that_refuses_is_named_with_its_reason_once_and_the_password_nowhere(new_broker, log_lines):
    broker = new_broker(password=True)
    await broker.start()
    async with running(connection(broker, url=f"mqtt://{USER}:wrong-secret@127.0.0.1:{broker.port}")):
        await wait_until(lambda: broker.log.count("not authorised") >= 3, what="several tries")

    lines = [line for line in log_lines() if line["event"] == "mqtt_lost"]
    assert [line["reason"] for line in lines] == ["BROKER_REFUSED"]
    assert "Not authorized" in lines[0]["problem"]
    assert "wrong-secret" not in json.dumps(log_lines())


async def test_user_and_password_are_read_from_the_url_and_the_file(new_broker, tmp_path):
    broker = new_broker(password=True)
    await broker.start()
    (tmp_path / "password").write_text(PASSWORD + "\n")
    found = broker_of(f"mqtt://{USER}@127.0.0.1:{broker.port}", password_file=str(tmp_path / "password"), ca_file="")
    async with running(Connection(found, client_id="c", status_topic=STATUS)):
        heard = await broker.listen(STATUS)
        await heard.says(STATUS, "online")


@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")  # paho leaves a refused one to the GC
async def test_over_tls_only_a_broker_that_the_ca_file_vouches_for_hears_anything(
    new_broker, ports, log_lines, tmp_path
):
    tls_port = ports()
    broker = new_broker(tls_port=tls_port)
    await broker.start()
    url = f"mqtts://localhost:{tls_port}"
    heard = await broker.listen(STATUS)
    async with running(connection(broker, url=url)):
        await wait_until(log_lines, what="it complains")
    assert "CERTIFICATE_VERIFY_FAILED" in log_lines()[0]["problem"]
    assert heard.on(STATUS) == []
    other = broker_of(url, password_file="", ca_file=str(tmp_path / "none"))
    async with running(Connection(other, client_id="c", status_topic=STATUS)):
        await wait_until(lambda: len(log_lines()) > 1, what="it complains")
    assert "mqtt_ca_file = " in log_lines()[1]["problem"]

    trusting = broker_of(url, password_file="", ca_file=str(broker.certificate))
    async with running(Connection(trusting, client_id="c", status_topic=STATUS)):
        await heard.says(STATUS, "online")
    gc.collect()  # here, where the warning is expected


async def test_a_frozen_broker_holds_nobody_up_at_the_end(broker):
    async with running(connection(broker)) as link:
        heard = await broker.listen(STATUS)
        await heard.says(STATUS, "online")
        os.kill(broker.pid, signal.SIGSTOP)
        link.publish(state({"free_bytes": 3}))
        begun = time.monotonic()
    os.kill(broker.pid, signal.SIGCONT)
    assert time.monotonic() - begun < 5


async def test_another_one_that_says_offline_in_our_name_is_contradicted(broker):
    async with running(connection(broker)):
        heard = await broker.listen(STATUS)
        await heard.says(STATUS, "online")
        await broker.publish(STATUS, "offline", "-r")
        await wait_until(lambda: heard.on(STATUS)[-2:] == ["offline", "online"], what="contradicted")


async def test_messages_reach_the_handler_of_their_topic_with_what_they_carry(broker, log_lines):
    link, received = connection(broker), []
    link.subscribe("in/a", received.append)
    link.subscribe("in/b", lambda _: 1 / 0)  # a bug in one handler
    async with running(link):
        heard = await broker.listen(STATUS)
        await heard.says(STATUS, "online")
        await broker.publish("in/b", "x")
        words = ("-D", "publish", "response-topic", "out", "-D", "publish", "correlation-data", "7")
        await broker.publish("in/a", "y", *words, "-D", "publish", "user-property", "api_key", "k")
        await wait_until(lambda: received, what="received")

    assert "mqtt_message_failed" in {line["event"] for line in log_lines()}
    assert received[0].payload == b"y"
    assert (received[0].response_topic, received[0].correlation) == ("out", b"7")
    assert received[0].user == {"api_key": "k"}


async def test_a_word_that_is_on_its_way_at_the_end_delays_it_not(broker):
    """An answer of the broker that comes in the very moment of a cancellation must not swallow it."""
    for pause in range(20):
        async with running(connection(broker)) as link:
            heard = await broker.listen(STATUS)
            await heard.says(STATUS, "online")
            for number in range(30):
                link.publish(Publication(topic="event", payload=b"%d" % number))
            for _ in range(pause):
                await asyncio.sleep(0)


async def test_a_cancellation_that_the_library_swallows_is_heeded():
    async def swallowing():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    task = asyncio.create_task(heeding(swallowing()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_connection_that_breaks_in_the_moment_of_the_end_delays_it_not(broker, monkeypatch):
    async def lost(*_):
        raise MqttError("Disconnected")

    async with running(connection(broker)) as link:
        await wait_until(lambda: link._client and not link._wake.is_set(), what="all is said")
        monkeypatch.setattr(module, "publish", lost)
        link.publish(state("1"))


async def test_a_subscription_that_ends_while_others_are_made_costs_no_connection(broker, monkeypatch):
    asked, subscribe = [], module.aiomqtt.Client.subscribe

    async def subscribed(client, topic, **options):
        asked.append(topic)
        await link.unsubscribe("b")
        return await subscribe(client, topic, **options)

    monkeypatch.setattr(module.aiomqtt.Client, "subscribe", subscribed)
    link = connection(broker)
    link.subscribe("a", lambda _: None)
    link.subscribe("b", lambda _: None)
    async with running(link):
        await wait_until(lambda: link._client, what="connected")
    assert asked == [STATUS, "a"]
