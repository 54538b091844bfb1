"""Reads in Redis what agents and heads have put up there: no daemon reads it back."""

from typing import Any

import msgspec
from redis import Redis
from sollol.registry import EVENTS_KEY, NODES_KEY, node_key
from sollol.report import Report


def reports(url: str) -> tuple[Report, ...]:
    """Every report whose lease stands, in the order of the node ids."""
    with Redis.from_url(url) as redis:
        ids = sorted(member.decode() for member in redis.zrange(NODES_KEY, 0, -1))
        values = [redis.get(node_key(node_id)) for node_id in ids]
    return tuple(msgspec.json.decode(value, type=Report) for value in values if value is not None)


def events(url: str) -> list[tuple[str, Any]]:
    """Kind and payload of every entry of the history, oldest first."""
    with Redis.from_url(url) as redis:
        entries = redis.xrange(EVENTS_KEY)
    return [(fields[b"kind"].decode(), msgspec.json.decode(fields[b"payload"])) for _, fields in entries]
