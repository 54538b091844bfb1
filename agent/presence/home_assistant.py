"""Home Assistant's device discovery: one configuration per node, so that it and its pools simply appear there. Pure.

One device per node, with components; what a component shows is read from the state topics. A pool's component is that
of its model and number, so that its history goes on when another pool takes that seat.
"""

import re
import zlib
from collections.abc import Iterable
from typing import Any

from sollol.topics import OFFLINE, ONLINE, Topics

from agent.presence.state import NodeState, PoolState

ORIGIN = "SOLLOL"
SEATS_REMEMBERED = 256
_NAMED = {"state_class": "measurement"}
_BYTES = {"device_class": "data_size", "unit_of_measurement": "B", "suggested_unit_of_measurement": "GiB", **_NAMED}


class Discovery:
    """Makes the configuration of one node; remembers the pools that went, since each has to be taken out by name.

    Args:
        prefix: The topic below which Home Assistant reads configuration.
        expire_after_s: State that is older counts as unknown.
    """

    def __init__(self, topics: Topics, *, cluster: str, node_id: str, prefix: str, expire_after_s: int) -> None:
        self._topics = topics
        self._node_id = node_id
        self._expire_after_s = expire_after_s
        self._unique = f"sollol_{slug(cluster)}_{slug(node_id)}"
        self._seats: dict[str, None] = {}
        self.topic = f"{prefix}/device/{self._unique}/config"
        self.birth_topic = f"{prefix}/status"

    def config(self, node: NodeState, pools: Iterable[PoolState]) -> dict[str, Any]:
        seats = {_seat(pool): pool for pool in pools}
        gone = [seat for seat in self._seats if seat not in seats]
        self._seats = dict.fromkeys([*gone, *seats][-SEATS_REMEMBERED:])
        return {
            "dev": {
                "ids": [self._unique],
                "name": f"{ORIGIN} {self._node_id}",
                "mf": ORIGIN,
                "mdl": "node",
                "sw": node.version,
            },
            "o": {"name": ORIGIN, "sw": node.version},
            "cmps": {
                **self._of_node(),
                **{seat: {"p": "sensor"} for seat in gone},  # nothing but the platform: it is taken out
                **{seat: self._of_pool(seat, pool) for seat, pool in seats.items()},
            },
        }

    def _of_node(self) -> dict[str, dict[str, Any]]:
        state, status = self._topics.node_state(self._node_id), self._topics.node_status(self._node_id)
        return {
            "online": {
                "p": "binary_sensor",
                "name": "Online",
                "device_class": "connectivity",
                "state_topic": status,
                "payload_on": ONLINE.decode(),
                "payload_off": OFFLINE.decode(),
                "unique_id": f"{self._unique}_online",
            },
            "free_memory": self._sensor("free_memory", "Free memory", state, "free_bytes", **_BYTES),
            "reserved_memory": self._sensor("reserved_memory", "Reserved memory", state, "reserved_bytes", **_BYTES),
            "pools": self._sensor("pools", "Pools", state, "pools_ready", **_NAMED),
            "streams": self._sensor("streams", "Streams", state, "active_streams", **_NAMED),
            "speed": self._sensor("speed", "Speed", state, "tokens_per_s", unit_of_measurement="tokens/s", **_NAMED),
        }

    def _of_pool(self, seat: str, pool: PoolState) -> dict[str, Any]:
        topic = self._topics.pool_state(pool.pool_id)
        return self._sensor(seat, f"{pool.model} pool {pool.number}", topic, "state", json_attributes_topic=topic)

    def _sensor(self, key: str, name: str, topic: str, field: str, **more: Any) -> dict[str, Any]:
        return {
            "p": "sensor",
            "name": name,
            "state_topic": topic,
            "value_template": f"{{{{ value_json.{field} }}}}",
            "unique_id": f"{self._unique}_{key}",
            "expire_after": self._expire_after_s,
            "availability_topic": self._topics.node_status(self._node_id),
            "payload_available": ONLINE.decode(),
            "payload_not_available": OFFLINE.decode(),
            **more,
        }


def _seat(pool: PoolState) -> str:
    return f"pool_{slug(pool.model)}_{pool.number}"


def slug(text: str) -> str:
    """`text` as Home Assistant takes it in ids; with a checksum where something had to be replaced."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    return plain if plain == text else f"{plain}_{zlib.crc32(text.encode(errors='replace')):08x}"
