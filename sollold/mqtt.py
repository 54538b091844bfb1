"""What a head does over MQTT, put together; only where a broker is configured is the client library loaded."""

import time

import msgspec
from sollol.broker import broker_of
from sollol.lifecycle import Closing, Stop
from sollol.mqtt_outbox import Publication
from sollol.report import Decision
from sollol.topics import Topics

from sollold.admission import Admission
from sollold.config import HeadConfig
from sollold.decision_event import event_of
from sollold.history import History
from sollold.streams import Dispatcher

CLOSES_WITHIN_S = 5.0
PACKET_BYTES = 65_536
MOST_PACKET_BYTES = 268_435_455  # MQTT's own


def start_mqtt(
    config: HeadConfig, closing: Closing, stop: Stop, *, history: History, dispatcher: Dispatcher, admission: Admission
) -> None:
    """Tell the broker that this head is online and what it decides, and answer requests if enabled, until the closing.

    Raises:
        ConfigError: there is no password in the configured file.
    """
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - see above

    from sollold.front.mqtt import MqttFront  # noqa: PLC0415 - see above

    head_id, topics = config.head_id(), Topics(config.mqtt_cluster)
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollold/{config.mqtt_cluster}/{head_id}",
        status_topic=topics.head_status(head_id),
        packet_bytes=_packet_bytes(config),
    )

    def decided(decision: Decision) -> None:
        event = event_of(decision, head_id, round(time.time(), 3))
        connection.publish(Publication(topic=topics.event(), payload=msgspec.json.encode(event)))

    history.subscribe(decided)
    if config.mqtt_inference:
        front = MqttFront(
            connection,
            dispatcher,
            admission,
            topics=topics,
            most_running=config.mqtt_requests,
            max_bytes=config.max_body_bytes,
            discovery_prefix=config.mqtt_discovery_prefix,
            grace_s=config.shutdown_grace_s,
        )
    closing.run("MQTT", connection.run(), stop, within_s=CLOSES_WITHIN_S)
    if config.mqtt_inference:
        closing.add("MQTT requests", front.close, within_s=config.shutdown_grace_s + CLOSES_WITHIN_S)


def _packet_bytes(config: HeadConfig) -> int:
    """Room for a request of the largest size, so that it is refused with a word, and not by the broker."""
    return min(config.max_body_bytes + PACKET_BYTES, MOST_PACKET_BYTES) if config.mqtt_inference else PACKET_BYTES
