"""Puts presence together, for `agent.app`; only where a broker is configured is the client library loaded."""

from sollol.broker import broker_of
from sollol.lifecycle import Closing, Stop
from sollol.topics import Topics

from agent.config import AgentConfig

CLOSES_WITHIN_S = 5.0


def start_presence(config: AgentConfig, closing: Closing, stop: Stop) -> None:
    """Tell the broker that this node is online, until the closing step.

    Raises:
        ConfigError: there is no password in the configured file.
    """
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - see above

    topics = Topics(config.mqtt_cluster)
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollol-agent/{config.mqtt_cluster}/{config.node_id}",
        status_topic=topics.node_status(config.node_id),
    )
    closing.run("MQTT", connection.run(), stop, within_s=CLOSES_WITHIN_S)
