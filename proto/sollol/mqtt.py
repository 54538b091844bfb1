"""One connection to an MQTT 5 broker: presence by Last Will, a bounded outbox, and for ever another try.

Import it only where a broker is configured: it loads the client library.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import aiomqtt
import structlog
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.reasoncodes import ReasonCode

from sollol.broker import Broker
from sollol.errors import Reason, refuse
from sollol.mqtt_client import Received, heeding, new_client, publish, received
from sollol.mqtt_outbox import Outbox, Publication
from sollol.topics import OFFLINE, ONLINE

log = structlog.get_logger(__name__)

RETRY_MIN_S, RETRY_MAX_S = 0.25, 10.0
GOODBYE_WITHIN_S = 2.0
PACKET_BYTES = 65_536
_TAKEN_OVER = 142
_REFUSED_FROM = 128


class Connection:
    """`run()` keeps it; `publish` never waits, and nothing that goes wrong here is anybody else's trouble.

    Args:
        client_id: Stable over restarts, so that one that comes back in time cancels its own Last Will.
        status_topic: Where "online" and "offline" are retained.
        packet_bytes: The broker keeps larger messages from us.
    """

    def __init__(self, broker: Broker, *, client_id: str, status_topic: str, packet_bytes: int = PACKET_BYTES) -> None:
        self._broker = broker
        self._client_id = client_id
        self._status_topic = status_topic
        self._packet_bytes = packet_bytes
        self._outbox = Outbox()
        self._wake = asyncio.Event()
        self._subscriptions: dict[str, tuple[str, Callable[[Received], None]]] = {}
        self._client: aiomqtt.Client | None = None
        self._problem = ""
        self._publish_status()
        self.subscribe(status_topic, self._status_seen)

    def subscribe(self, topic: str, handler: Callable[[Received], None], *, group: str = "") -> None:
        """Have `handler` called with every message to `topic`, from the next connection on.

        With a `group` each message goes to one of the group's members.
        """
        self._subscriptions[topic] = (f"$share/{group}/{topic}" if group else topic, handler)

    async def unsubscribe(self, topic: str) -> None:
        """Hear no more of it."""
        found = self._subscriptions.pop(topic, None)
        if found is not None and self._client is not None:
            with suppress(aiomqtt.MqttError):  # a new connection does not subscribe to it
                await heeding(self._client.unsubscribe(found[0]))

    def publish(self, publication: Publication) -> None:
        """Leave it in the outbox, from which it goes as soon as the broker takes it."""
        self._outbox.put(publication)
        self._wake.set()

    async def send(self, publication: Publication) -> None:
        """Publish now, past the outbox; return when the broker has it, which is how a slow one slows the sender.

        Raises:
            SollolError: BROKER_UNREACHABLE.
        """
        client = self._client
        if client is None:
            raise refuse(Reason.BROKER_UNREACHABLE, "no connection to the MQTT broker", retryable=True)
        try:
            await publish(client, publication)
        except aiomqtt.MqttError as error:
            raise refuse(
                Reason.BROKER_UNREACHABLE, f"the MQTT broker did not take it: {error}", retryable=True
            ) from error

    async def run(self) -> None:
        """Stay connected until cancelled; then say "offline", empty the outbox within a bound, and leave."""
        pause_s = RETRY_MIN_S
        while True:
            try:
                await self._session()
            except Exception as error:  # noqa: BLE001 - logged by _complain; a bug in here must not end the daemon
                lost = _cause(error)
            was_connected, self._client = self._client is not None, None
            if was_connected:
                pause_s = RETRY_MAX_S if _code(lost) == _TAKEN_OVER else RETRY_MIN_S
            self._complain(lost)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - heads and agents come back one by one
            pause_s = min(pause_s * 2, RETRY_MAX_S)

    async def _session(self) -> None:
        """One connection; ends by MqttError only, or by cancellation."""
        client = new_client(
            self._broker,
            client_id=self._client_id,
            status_topic=self._status_topic,
            packet_bytes=self._packet_bytes,
        )
        await heeding(client.__aenter__())
        try:
            await _until_one_ends(self._receive(client), self._speak(client))
        except asyncio.CancelledError:
            await self._say_goodbye(client)
            raise
        finally:
            with suppress(aiomqtt.MqttError, TimeoutError):
                async with asyncio.timeout(GOODBYE_WITHIN_S):
                    await heeding(client.__aexit__(None, None, None))

    async def _speak(self, client: aiomqtt.Client) -> None:
        await self._subscribe_all(client)
        self._outbox.restore()
        self._client = client
        self._problem = ""
        log.info("mqtt_connected", broker=self._broker.address)
        await self._drain(client)

    async def _subscribe_all(self, client: aiomqtt.Client) -> None:
        for topic in tuple(self._subscriptions):
            if (found := self._subscriptions.get(topic)) is None:  # meanwhile nobody wants to hear of it any more
                continue
            topic_filter, _ = found
            for code in await heeding(client.subscribe(topic_filter, qos=1)):
                if isinstance(code, ReasonCode) and code.value >= _REFUSED_FROM:
                    log.warning("mqtt_subscription_refused", topic=topic_filter, problem=str(code))

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = str(message.topic)
            found = self._subscriptions.get(topic)
            if found is None or not isinstance(message.payload, bytes):
                continue
            try:
                found[1](received(topic, message))
            except Exception:  # a bug of a handler must not cost the connection
                log.exception("mqtt_message_failed", topic=topic)

    async def _drain(self, client: aiomqtt.Client) -> None:
        while True:
            publication = self._outbox.take()
            if publication is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await publish(client, publication)
            except BaseException:
                self._outbox.put_back(publication)
                raise

    async def _say_goodbye(self, client: aiomqtt.Client) -> None:
        offline = Publication(topic=self._status_topic, payload=OFFLINE, retain=True)
        with suppress(aiomqtt.MqttError, TimeoutError):  # else the Last Will says it
            async with asyncio.timeout(GOODBYE_WITHIN_S):
                await publish(client, offline)
                while (publication := self._outbox.take()) is not None:
                    if publication.topic != self._status_topic:
                        await publish(client, publication)

    def _publish_status(self) -> None:
        self.publish(Publication(topic=self._status_topic, payload=ONLINE, retain=True))

    def _status_seen(self, message: Received) -> None:
        """An old Last Will, or another with our name that left, does not make us offline."""
        if message.payload != ONLINE and self._client is not None:
            self._publish_status()

    def _complain(self, error: BaseException) -> None:
        """Once per reason: a broker that is down for a night fills no log."""
        problem = str(error)
        if problem != self._problem:
            reason = Reason.BROKER_REFUSED if isinstance(error, MqttConnectError) else Reason.BROKER_UNREACHABLE
            bug = None if isinstance(error, aiomqtt.MqttError | OSError) else error
            log.warning("mqtt_lost", broker=self._broker.address, reason=reason, problem=problem, exc_info=bug)
        self._problem = problem


async def _until_one_ends(*work: Coroutine[Any, Any, None]) -> None:
    """Run all of it, and end with what ends first. A task group loses a cancellation when a part fails just then."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        if task in ended:
            task.result()


def _cause(error: BaseException) -> BaseException:
    """What a library's "Disconnected during message iteration" comes from."""
    return error.__cause__ if isinstance(error, aiomqtt.MqttError) and error.__cause__ is not None else error


def _code(error: BaseException) -> int:
    code = getattr(error, "rc", None)
    return int(getattr(code, "value", 0) or 0)
