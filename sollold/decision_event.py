"""What others are told of a decision. Pure."""

import msgspec
from msgspec import Struct
from sollol.mqtt_outbox import Publication
from sollol.report import Decision


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


def publication_of(decision: Decision, head_id: str, unix_s: float, *, topic: str) -> Publication:
    return Publication(topic=topic, payload=msgspec.json.encode(event_of(decision, head_id, round(unix_s, 3))))


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
