"""What waits to be published over MQTT. Pure.

Retained words (state, presence) are kept by topic, newest only, and are all due again after a reconnect, since a broker
may have come back with nothing. Anything else is due once. Both are bounded: what is oldest is dropped first.
"""

from collections import deque

from msgspec import Struct

TOPICS_KEPT = 1024
EVENTS_KEPT = 256


class Publication(Struct, frozen=True, kw_only=True):
    """One message to the broker; an empty retained one removes what is retained there.

    Attributes:
        expiry_s: The broker drops it after so many seconds; 0: never.
        correlation: Given back to whoever asked; None: this is no answer.
    """

    topic: str
    payload: bytes
    retain: bool = False
    qos: int = 1
    expiry_s: int = 0
    correlation: bytes | None = None


class Outbox:
    """Never blocks; `dropped` counts what had no room."""

    def __init__(self, *, topics_kept: int = TOPICS_KEPT, events_kept: int = EVENTS_KEPT) -> None:
        self._topics_kept, self._events_kept = topics_kept, events_kept
        self._retained: dict[str, Publication] = {}  # by topic, the oldest word first
        self._due: dict[str, None] = {}  # topics, in the order in which they became due
        self._events: deque[Publication] = deque()
        self.dropped = 0

    def put(self, publication: Publication) -> None:
        if not publication.retain:
            self._events.append(publication)
            if len(self._events) > self._events_kept:
                self._events.popleft()
                self.dropped += 1
            return
        self._retained.pop(publication.topic, None)
        self._retained[publication.topic] = publication
        self._due[publication.topic] = None
        if len(self._retained) > self._topics_kept:
            oldest = next(iter(self._retained))
            del self._retained[oldest]
            self._due.pop(oldest, None)
            self.dropped += 1

    def take(self) -> Publication | None:
        """The next one that is due: retained words first, then events, both in order."""
        if self._due:
            topic = next(iter(self._due))
            del self._due[topic]
            publication = self._retained[topic]
            if not publication.payload:
                del self._retained[topic]
            return publication
        return self._events.popleft() if self._events else None

    def put_back(self, publication: Publication) -> None:
        """It could not be sent: it is due again, unless there is a newer word."""
        if not publication.retain:
            self._events.appendleft(publication)
        elif publication.topic not in self._retained:
            self.put(publication)
        else:
            self._due[publication.topic] = None

    def restore(self) -> None:
        """Every retained word is due again."""
        self._due = dict.fromkeys((*self._due, *self._retained))
