"""Puts the head's presence over MQTT together; only where a broker is configured is the client library loaded."""

from sollol.broker import broker_of
from sollol.lifecycle import Closing, Stop
from sollol.topics import Topics

from sollold.config import HeadConfig

CLOSES_WITHIN_S = 5.0


def start_presence(config: HeadConfig, closing: Closing, stop: Stop) -> None:
    """Tell the broker that this head is online, until the closing step.

    Raises:
        ConfigError: there is no password in the configured file.
    """
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - see above

    head_id = config.head_id()
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollold/{config.mqtt_cluster}/{head_id}",
        status_topic=Topics(config.mqtt_cluster).head_status(head_id),
    )
    closing.run("MQTT", connection.run(), stop, within_s=CLOSES_WITHIN_S)
