"""What this head counts, from its start on: requests, tokens, waiting, placements, loads, and who was refused.

Nothing is counted per token. Labels come from closed sets: reasons, fronts, and names of models that nodes have.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, disable_created_metrics
from sollol.errors import Reason, SollolError
from sollol.report import Decision

from sollold.numbers import GaveWayError

T = TypeVar("T")

OK = "ok"
GAVE_WAY = "gave_way"  # to another head, which loads the very same pool
_ANSWER_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_LOAD_S = (0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)

disable_created_metrics()  # type: ignore[no-untyped-call] # a series more beside each counter, which nobody here would read


class Account:
    """One request, from its arrival to its end. Whoever brings it about `end`s it, once.

    Attributes:
        model: As the user named it; empty until that is known.
        prompt_tokens: By the engine's count; of a stream that was cut, by the size of the prompt.
        generated_tokens: By the engine's count; of a stream that was cut, those that have passed.
    """

    def __init__(self, end: Callable[["Account", Reason | None], None], clock: Callable[[], float]) -> None:
        self._end, self._clock = end, clock
        self._began_s = clock()
        self.model = ""
        self.first_s: float | None = None
        self.prompt_tokens = self.generated_tokens = 0

    def began(self) -> None:
        """The engine's first bytes are here."""
        self.first_s = self.took_s()

    def took_s(self) -> float:
        return self._clock() - self._began_s

    def end(self, reason: Reason | None) -> None:
        """None: it was answered."""
        self._end(self, reason)


class Metrics:
    """Owner of all counts.

    Args:
        known: The model's own name for a name or alias; None for one that nobody has, which becomes no label.
    """

    def __init__(self, known: Callable[[str], str | None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._known, self._clock = known, clock
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "sollol_requests_total",
            "Requests for an answer that have ended; `outcome` is ok or the reason.",
            "front", "model", "outcome",
        )  # fmt: skip
        self._prompt = self._counter("sollol_prompt_tokens_total", "Tokens of prompts that engines have read.", "model")
        self._generated = self._counter("sollol_generated_tokens_total", "Tokens generated.", "model")
        self._first = self._histogram(
            "sollol_time_to_first_token_seconds", "From a request's arrival to the engine's first bytes.", _ANSWER_S
        )
        self._duration = self._histogram(
            "sollol_request_duration_seconds",
            "From a request's arrival to its end, of those that an engine has begun to answer.",
            _ANSWER_S,
        )
        self._queue = self._histogram(
            "sollol_queue_wait_seconds", "Waited for a slot, loads included, in vain or not.", _ANSWER_S
        )
        self._placements = self._counter(
            "sollol_placements_total", "Decisions for a load; `outcome` is ok or the reason.", "model", "outcome"
        )
        self._loads = self._counter(
            "sollol_loads_total",
            "Loads that have ended; `outcome` is ok, gave_way (to another head's) or the reason.",
            "model", "outcome",
        )  # fmt: skip
        self._load_s = self._histogram("sollol_load_seconds", "Loads that came up, placement included.", _LOAD_S)
        self._peers = self._counter("sollol_peers_refused_total", "Calls refused for their certificate.", "reason")
        self._keys = self._counter("sollol_keys_refused_total", "Requests refused for their API key.", "reason")

    def collect(self) -> Iterator[Metric]:
        """May be called from any thread."""
        yield from self._registry.collect()

    def request(self, front: str) -> Account:
        """A request has arrived: over http, grpc or mqtt."""
        return Account(lambda account, reason: self._ended(front, account, reason), self._clock)

    @contextmanager
    def requested(self, front: str) -> Iterator[Account]:
        """Count a request by how this block ends."""
        account = self.request(front)
        reason: Reason | None = Reason.INTERNAL
        try:
            yield account
            reason = None
        except SollolError as error:
            reason = error.refusal.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            reason = Reason.CANCELLED
            raise
        finally:
            account.end(reason)

    def waited(self, model: str, seconds: float) -> None:
        """A request has a slot, or has given up."""
        self._queue.labels(self._label(model)).observe(seconds)

    def placed(self, decision: Decision) -> None:
        outcome = OK if decision.refusal is None else decision.refusal.reason.value
        self._placements.labels(self._label(decision.model), outcome).inc()

    async def load(self, model: str, loading: Awaitable[T]) -> T:
        """Await a load, counting how it ends."""
        outcome, began_s = Reason.INTERNAL.value, self._clock()
        try:
            loaded = await loading
            outcome = OK
            self._load_s.labels(self._label(model)).observe(self._clock() - began_s)
        except SollolError as error:
            outcome = error.refusal.reason.value
            raise
        except GaveWayError:
            outcome = GAVE_WAY
            raise
        except asyncio.CancelledError:
            outcome = Reason.STOPPED.value
            raise
        finally:
            self._loads.labels(self._label(model), outcome).inc()
        return loaded

    def peer_refused(self, reason: Reason) -> None:
        self._peers.labels(reason.value).inc()

    def key_refused(self, reason: Reason) -> None:
        self._keys.labels(reason.value).inc()

    def _ended(self, front: str, account: Account, reason: Reason | None) -> None:
        model = self._label(account.model)
        self._requests.labels(front, model, OK if reason is None else reason.value).inc()
        if account.first_s is None:
            return
        self._first.labels(model).observe(account.first_s)
        self._duration.labels(model).observe(account.took_s())
        self._prompt.labels(model).inc(account.prompt_tokens)
        self._generated.labels(model).inc(account.generated_tokens)

    def _label(self, model: str) -> str:
        """Empty for what is no model's name: anybody can ask for anything."""
        return self._known(model) or ""

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ("model",), buckets=buckets, registry=self._registry)
