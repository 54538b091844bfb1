"""What a head says over MQTT, put together; only where a broker is configured is the client library loaded."""

import time

import msgspec
from msgspec import Struct
from sollol.broker import broker_of
from sollol.lifecycle import Closing, Stop
from sollol.mqtt_outbox import Publication
from sollol.report import Decision
from sollol.topics import Topics

from sollold.config import HeadConfig
from sollold.history import History

CLOSES_WITHIN_S = 5.0


class Event(Struct, frozen=True, kw_only=True):
    """`event`: placement (on `nodes`, the coordinator's first), or refused (`reason` and `message` say why)."""

    event: str
    unix_s: float
    head_id: str
    model: str
    policy: str
    nodes: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""


def event_of(decision: Decision, head_id: str, unix_s: float) -> Event:
    refusal = decision.refusal
    lenders = dict.fromkeys(share.node_id for share in decision.plan.shares if share.node_id) if decision.plan else {}
    return Event(
        event="placement" if refusal is None else "refused",
        unix_s=unix_s,
        head_id=head_id,
        model=decision.model,
        policy=decision.policy,
        nodes=tuple(dict.fromkeys((decision.coordinator, *lenders))) if decision.coordinator else (),
        reason=refusal.reason.value if refusal is not None else "",
        message=refusal.message if refusal is not None else "",
    )


def start_presence(config: HeadConfig, history: History, closing: Closing, stop: Stop) -> None:
    """Tell the broker that this head is online and what it decides, until the closing step.

    Raises:
        ConfigError: there is no password in the configured file.
    """
    if not config.mqtt_url:
        return
    from sollol.mqtt import Connection  # noqa: PLC0415 - see above

    head_id, topics = config.head_id(), Topics(config.mqtt_cluster)
    connection = Connection(
        broker_of(config.mqtt_url, password_file=config.mqtt_password_file, ca_file=config.mqtt_ca_file),
        client_id=f"sollold/{config.mqtt_cluster}/{head_id}",
        status_topic=topics.head_status(head_id),
    )

    def decided(decision: Decision) -> None:
        event = event_of(decision, head_id, round(time.time(), 3))
        connection.publish(Publication(topic=topics.event(), payload=msgspec.json.encode(event)))

    history.subscribe(decided)
    closing.run("MQTT", connection.run(), stop, within_s=CLOSES_WITHIN_S)
