"""Publishes what the reports say: state of the node and of its pools, what happened to them, Home Assistant's words."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from sollol.mqtt_outbox import Publication
from sollol.report import Report
from sollol.topics import ONLINE, Topics

from agent.presence.events import events_between
from agent.presence.home_assistant import Discovery
from agent.presence.state import NodeState, PoolState, node_state, pool_states

if TYPE_CHECKING:
    from sollol.mqtt_client import Received

LOAD_GAP_S = 1.0  # streams come and go by the second; pools' comings and goings are told at once
EXPIRY_INTERVALS = 3


class Connected(Protocol):
    """What `sollol.mqtt.Connection` is to this module."""

    def subscribe(self, topic: str, handler: Callable[["Received"], None]) -> None: ...

    def publish(self, publication: Publication) -> None: ...


class Presence:
    """`run()` follows the reports.

    Args:
        interval_s: State is published so often when nothing happens.
        discoverable: Whether Home Assistant is told of this node; else it is told to forget it.
        leave: The pools outlive this agent, and so does their state, until the next one renews it or it expires.
    """

    def __init__(
        self,
        connection: Connected,
        *,
        topics: Topics,
        watch: Callable[[], AsyncIterator[Report]],
        interval_s: float,
        discovery: Discovery,
        discoverable: bool = True,
        leave: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._publish = connection.publish
        self._topics = topics
        self._watch = watch
        self._interval_s = interval_s
        self._discovery = discovery
        self._discoverable = discoverable
        self._leave = leave
        self._clock = clock
        self._published_s: float | None = None
        self._node: NodeState | None = None
        self._pools: dict[str, PoolState] = {}  # as they were published
        self._seen: dict[str, PoolState] = {}  # as they were in the last report
        self._config: bytes = b""
        if discoverable:
            connection.subscribe(discovery.birth_topic, self._home_assistant_says)
        else:  # it may have been told in an earlier life
            self._publish(Publication(topic=discovery.topic, payload=b"", retain=True))

    async def run(self) -> None:
        """Until cancelled; pools that go with their agent take their state with them."""
        reports = self._watch()
        assert isinstance(reports, AsyncGenerator)
        try:
            async with aclosing(reports):
                async for report in reports:
                    self.heard(report)
        finally:
            for pool_id in () if self._leave else self._pools:
                self._remove(pool_id)

    def heard(self, report: Report) -> None:
        """Publish what is due after this report."""
        pools = {pool.pool_id: pool for pool in pool_states(report)}
        first = self._published_s is None
        events = [] if first else list(events_between(self._seen, pools.values(), round(report.measured_unix_s, 3)))
        for event in events:
            self._publish(Publication(topic=self._topics.event(), payload=msgspec.json.encode(event)))
        self._seen = pools
        now = self._clock()
        since_s = now - self._published_s if self._published_s is not None else self._interval_s
        if not (events or since_s >= self._interval_s or (since_s >= LOAD_GAP_S and pools != self._pools)):
            return
        self._published_s = now
        gone, self._pools = self._pools.keys() - pools.keys(), pools
        self._node = node_state(report, pools.values())
        for pool in pools.values():
            self._retain(self._topics.pool_state(pool.pool_id), pool)
        self._retain(self._topics.node_state(report.node_id), self._node)
        self._tell_home_assistant()
        for pool_id in gone:  # last, when nobody at home reads it any more: removed state is no JSON
            self._remove(pool_id)

    def _home_assistant_says(self, message: "Received") -> None:
        if message.payload == ONLINE:  # it has just started, and may have forgotten everything
            self._config = b""
            self._tell_home_assistant()

    def _tell_home_assistant(self) -> None:
        if not self._discoverable or self._node is None:
            return
        config = msgspec.json.encode(self._discovery.config(self._node, self._pools.values()))
        if config != self._config:
            self._config = config
            self._publish(Publication(topic=self._discovery.topic, payload=config, retain=True))

    def _retain(self, topic: str, content: Any) -> None:
        self._publish(
            Publication(
                topic=topic,
                payload=msgspec.json.encode(content),
                retain=True,
                expiry_s=expiry_s(self._interval_s),
            )
        )

    def _remove(self, pool_id: str) -> None:
        self._publish(Publication(topic=self._topics.pool_state(pool_id), payload=b"", retain=True))


def expiry_s(interval_s: float) -> int:
    """How long state stands that nobody renews."""
    return max(1, round(EXPIRY_INTERVALS * interval_s))
