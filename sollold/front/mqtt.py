"""Requests over MQTT 5: a device names a response topic and gets the answer there, piece by piece.

Nothing else is obeyed here. A request is admitted, queued and limited as one over HTTP; the broker slows each answer
for itself, since the next piece is asked of the engine when it has taken the last one.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog
from sollol.errors import Reason, SollolError, refuse
from sollol.inference import Progress, Usage
from sollol.mqtt_outbox import Publication
from sollol.topics import Topics, problem_with_response_topic

from sollold.admission import Admission
from sollold.front.departure import Departure
from sollold.front.generation import generated
from sollold.front.mqtt_messages import SENT_AS, Answer, read_request
from sollold.metrics import Account, Metrics
from sollold.streams import Dispatcher

if TYPE_CHECKING:
    from sollol.mqtt_client import Received

log = structlog.get_logger(__name__)

GROUP = "sollol"  # each request goes to one of the heads
PROGRESS_GAP_S = 1.0
ANSWER_EXPIRY_S = 60  # a device that comes back later has no use for it
FULL_RETRY_AFTER_S = 5.0

_Key = tuple[str, bytes]


class Connected(Protocol):
    """What `sollol.mqtt.Connection` is to this module."""

    def subscribe(self, topic: str, handler: Callable[["Received"], None], *, group: str = "") -> None: ...

    async def unsubscribe(self, topic: str) -> None: ...

    def publish(self, publication: Publication) -> None: ...

    async def send(self, publication: Publication) -> None: ...


@dataclass(eq=False)
class _Running:
    task: asyncio.Task[None]
    cancelled: bool = False


class MqttFront:
    """Owner of the requests that came over MQTT.

    Args:
        most_running: Requests at the same time; more are refused.
        max_bytes: Of one request.
        discovery_prefix: No answer goes below it.
        grace_s: What running requests get to end in.
    """

    def __init__(
        self,
        connection: Connected,
        dispatcher: Dispatcher,
        admission: Admission,
        metrics: Metrics,
        *,
        topics: Topics,
        most_running: int,
        max_bytes: int,
        discovery_prefix: str,
        grace_s: float,
    ) -> None:
        self._connection = connection
        self._dispatcher = dispatcher
        self._admission = admission
        self._metrics = metrics
        self._topics = topics
        self._most_running = most_running
        self._max_bytes = max_bytes
        self._discovery_prefix = discovery_prefix
        self._departure = Departure(grace_s)
        self._running: dict[_Key, _Running] = {}
        self._dropped = 0
        connection.subscribe(topics.generate(), self._requested, group=GROUP)
        connection.subscribe(topics.cancel(), self._cancelled)

    async def close(self) -> None:
        """Leave new requests to other heads; let those that run end, or tell them that they do not."""
        await self._connection.unsubscribe(self._topics.generate())
        await self._departure.leave()
        await asyncio.gather(*(running.task for running in self._running.values()), return_exceptions=True)

    def _requested(self, message: "Received") -> None:
        key = _key(message)
        problem = problem_with_response_topic(message.response_topic, self._discovery_prefix)
        if problem is None and message.retained:
            problem = "the request is a retained message: it would be answered again and again"
        if problem is None and key in self._running:
            problem = "a request with the same response topic and correlation data is running"
        if problem is not None:
            self._dropped += 1
            self._metrics.request("mqtt").end(Reason.INVALID_REQUEST)
            log.warning("mqtt_request_dropped", reason=Reason.INVALID_REQUEST, problem=problem, dropped=self._dropped)
        elif len(self._running) >= self._most_running:
            error = refuse(
                Reason.QUEUE_FULL,
                f"this head answers {self._most_running} requests over MQTT already; ask again later",
                retryable=True,
                retry_after_s=FULL_RETRY_AFTER_S,
                numbers={"running": len(self._running)},
            )
            log.info("request_ended", method="MQTT", reason=error.refusal.reason)
            self._metrics.request("mqtt").end(error.refusal.reason)
            self._connection.publish(_to(message, Answer().failed(error)))
        else:
            task = asyncio.create_task(self._answer(message, key), name="answer over MQTT")
            self._running[key] = _Running(task)

    def _cancelled(self, message: "Received") -> None:
        """Every head hears it; the one that answers the request ends it."""
        running = self._running.get(_key(message))
        if running is not None and not running.cancelled:
            running.cancelled = True
            running.task.cancel()

    async def _answer(self, message: "Received", key: _Key) -> None:
        structlog.contextvars.bind_contextvars(request_id=uuid.uuid4().hex)
        answer, started = Answer(), time.monotonic()
        error: SollolError | None = None
        try:
            with self._metrics.requested("mqtt") as account, self._departure.running():
                await self._generate(message, answer, account)
        except SollolError as failure:
            error = failure
        except asyncio.CancelledError:
            if not self._running[key].cancelled:
                raise
            error = refuse(Reason.CANCELLED, "the request was cancelled")
        except Exception:
            log.exception("request_failed_unexpectedly")
            error = refuse(Reason.INTERNAL, "the head failed; see its log")
        finally:
            del self._running[key]
        # By the outbox: the broker may be the one that failed. Whoever cancels too late gets no second last message.
        if error is not None and (not answer.ended or error.refusal.reason is Reason.BROKER_UNREACHABLE):
            self._connection.publish(_to(message, answer.failed(error)))
        noted = {"reason": error.refusal.reason} if error is not None else {}
        log.info("request_ended", method="MQTT", took_s=round(time.monotonic() - started, 4), **noted)

    async def _generate(self, message: "Received", answer: Answer, account: Account) -> None:
        wanted = read_request(message.payload, message.user, max_bytes=self._max_bytes)
        engine = wanted.asked.engine
        account.model = engine.model
        structlog.contextvars.bind_contextvars(model=engine.model)
        permit = self._admission.admit(wanted.token, engine.model, sent_as=SENT_AS)
        finish_reason, usage, told_s = "", Usage(), 0.0
        async with aclosing(generated(self._dispatcher, engine, permit, account)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    if time.monotonic() - told_s >= PROGRESS_GAP_S:
                        told_s = time.monotonic()
                        await self._tell(message, answer.progress(event))
                    continue
                if event.text or event.reasoning:
                    await self._connection.send(_to(message, answer.chunk(event.text, event.reasoning)))
                finish_reason, usage = event.finish_reason or finish_reason, event.usage or usage
        await self._connection.send(_to(message, answer.finished(finish_reason, usage)))

    async def _tell(self, message: "Received", progress: bytes) -> None:
        """A broker that is away while a model loads misses what it would show, and the request waits on."""
        try:
            await self._connection.send(_to(message, progress))
        except SollolError as error:
            log.debug("mqtt_progress_missed", reason=error.refusal.reason)


def _key(message: "Received") -> _Key:
    return message.response_topic, message.correlation or b""


def _to(message: "Received", payload: bytes) -> Publication:
    return Publication(
        topic=message.response_topic, payload=payload, correlation=message.correlation, expiry_s=ANSWER_EXPIRY_S
    )
