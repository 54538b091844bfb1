"""Puts presence together, for `agent.app`; only where a broker is configured is the client library loaded."""

from collections.abc import AsyncIterator, Callable

from sollol.broker import broker_of
from sollol.lifecycle import Closing, Stop
from sollol.mqtt_outbox import Publication
from sollol.report import Report
from sollol.topics import ONLINE, Topics

from agent.config import AgentConfig
from agent.presence.home_assistant import Discovery
from agent.presence.presence import Presence, expiry_s

CLOSES_WITHIN_S = 5.0


def start_presence(
    config: AgentConfig, watch: Callable[[], AsyncIterator[Report]], closing: Closing, stop: Stop
) -> None:
    """Tell the broker that this node is online, and what its reports say, until the closing steps.

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
    interval_s = max(config.mqtt_interval_s, config.heartbeat_s)
    discovery = Discovery(
        topics,
        cluster=config.mqtt_cluster,
        node_id=config.node_id,
        prefix=config.mqtt_discovery_prefix,
        expire_after_s=expiry_s(interval_s),
    )
    presence = Presence(
        connection.publish,
        topics=topics,
        watch=watch,
        interval_s=interval_s,
        discovery=discovery if config.mqtt_discovery else None,
    )
    if config.mqtt_discovery:
        connection.subscribe(
            discovery.birth_topic,
            lambda message: presence.home_assistant_started() if message.payload == ONLINE else None,
        )
    else:  # it may have been told in an earlier life
        connection.publish(Publication(topic=discovery.topic, payload=b"", retain=True))
    closing.run("MQTT", connection.run(), stop, within_s=CLOSES_WITHIN_S)
    closing.run("presence", presence.run(), stop, within_s=CLOSES_WITHIN_S)  # ends first: MQTT tells its last words
