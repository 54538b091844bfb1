"""The MQTT client library, as `sollol.mqtt` uses it: what is asked of it, and where it has to be helped."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable
from typing import Any, TypeVar

import aiomqtt
from msgspec import Struct
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from sollol.broker import Broker
from sollol.mqtt_outbox import Publication
from sollol.topics import OFFLINE

T = TypeVar("T")

ANSWER_WITHIN_S = 5.0  # of the broker, to anything
KEEPALIVE_S = 5
# The broker says "offline" when a connection broke and none replaced it for so long; a session must outlive it.
WILL_DELAY_S = 1
SESSION_S = 5


class Received(Struct, frozen=True, kw_only=True):
    """A message from the broker. `user` are its user properties; of several with one name the last."""

    topic: str
    payload: bytes
    retained: bool = False
    response_topic: str = ""
    correlation: bytes | None = None
    user: dict[str, str] = {}


def new_client(broker: Broker, *, client_id: str, status_topic: str, packet_bytes: int) -> aiomqtt.Client:
    """A client that is not connected yet; its Last Will says OFFLINE on `status_topic`.

    Raises:
        MqttError: the CA's file cannot be read.
    """
    connect = properties(PacketTypes.CONNECT, SessionExpiryInterval=SESSION_S, MaximumPacketSize=packet_bytes)
    will = properties(PacketTypes.WILLMESSAGE, WillDelayInterval=WILL_DELAY_S)
    try:
        tls = ssl.create_default_context(cafile=broker.ca_file or None) if broker.tls else None
    except OSError as error:
        raise aiomqtt.MqttError(f"mqtt_ca_file = {broker.ca_file}: {error}") from None
    return _Client(
        broker.host,
        broker.port,
        username=broker.user or None,
        password=broker.password or None,
        identifier=client_id,
        protocol=aiomqtt.ProtocolVersion.V5,
        will=aiomqtt.Will(status_topic, OFFLINE, qos=1, retain=True, properties=will),
        timeout=ANSWER_WITHIN_S,
        keepalive=KEEPALIVE_S,
        clean_start=False,  # it would end the session of before, and with it send that one's Last Will
        properties=connect,
        tls_context=tls,
        socket_options=((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),),  # each piece of an answer waits for a reply
    )


class _Client(aiomqtt.Client):
    """The library registers a socket for writing a turn of the loop too late, when it may be closed and its number
    another's.
    """

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:  # noqa: ARG002 - as the library has it
        def register() -> None:
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), self._write)

        self._loop.call_soon_threadsafe(register)

    def _write(self) -> None:
        try:
            self._client.loop_write()
        except Exception as error:  # noqa: BLE001 - it ends the connection, and `run` tells of it
            if not self._disconnected.done():
                self._disconnected.set_exception(error)


async def publish(client: aiomqtt.Client, publication: Publication) -> None:
    said: dict[str, Any] = {}
    if publication.expiry_s:
        said["MessageExpiryInterval"] = publication.expiry_s
    if publication.correlation is not None:
        said["CorrelationData"] = publication.correlation
    await heeding(
        client.publish(
            publication.topic,
            publication.payload,
            qos=publication.qos,
            retain=publication.retain,
            properties=properties(PacketTypes.PUBLISH, **said),
        )
    )


async def heeding(call: Awaitable[T]) -> T:
    """Await the library without losing a cancellation: Python 3.11's `wait_for`, which it uses, can swallow one."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    result = await call
    if task.cancelling() > before:
        raise asyncio.CancelledError
    return result


def properties(packet: int, **values: Any) -> Properties:
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


def received(topic: str, message: aiomqtt.Message) -> Received:
    assert isinstance(message.payload, bytes)
    carried = message.properties
    return Received(
        topic=topic,
        payload=message.payload,
        retained=message.retain,
        response_topic=getattr(carried, "ResponseTopic", ""),
        correlation=getattr(carried, "CorrelationData", None),
        user=dict(getattr(carried, "UserProperty", ())),
    )
