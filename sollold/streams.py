"""Between the front and the dispatcher: what one asks for, and the stream of the engine's bytes that comes back."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from sollol.inference import AvailableModel, Progress

__all__ = ["AvailableModel", "Catalogue", "Dispatcher", "EngineRequest", "EngineStream", "Progress", "ProgressSink"]

ProgressSink = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A validated request in the engine's own form.

    Attributes:
        model: As the user named it: a name or an alias. The dispatcher resolves it.
        path: The engine's route, `/v1/chat/completions` or `/v1/completions`.
        body: JSON for llama-server; always says `"stream": true`, so that leaving frees the slot at once.
        asker: Whose turn it is when several wait for the same model: the name of a key, empty for all who need none.
    """

    model: str
    path: str
    body: bytes
    asker: str = ""


class EngineStream(Protocol):
    """One engine's HTTP response, once its status and headers are known.

    Iterated at most once, by one reader, who calls `aclose` whatever happened. The iterator ends where the engine's
    body ends; it raises SollolError (ENGINE_DIED, STREAM_STALLED, AGENT_UNREACHABLE, ...) when the body was cut.
    A body that ends in order but without its terminal event is the front's to notice.
    """

    @property
    def status(self) -> int:
        """The engine's HTTP status. From 400 on the body is one JSON error and not a stream of events."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The engine's response headers, names in lower case."""

    @property
    def model(self) -> str:
        """The resolved name of the model that answers."""

    @property
    def node_id(self) -> str: ...

    @property
    def instance_id(self) -> str:
        """Equal to the pool's id."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """The body in pieces of any size, as they arrive."""

    async def aclose(self) -> None:
        """Let go: the engine's slot is freed at once when the body has not ended. Safe to call again."""


class Dispatcher(Protocol):
    async def open(
        self, request: EngineRequest, on_progress: ProgressSink, on_sent: Callable[[], None]
    ) -> EngineStream:
        """Find or load a pool for the model, send the request there, return when the engine's status is known.

        `on_progress` is called from the event loop on every change of what the request waits for; never after this
        returns. `on_sent` is called when an engine is given the request, again with each further one. Cancelling the
        call gives up the place in the queue and the engine's slot.

        Raises:
            SollolError: refused, or failed before the engine answered; worth telling the user as it is.
        """


class Catalogue(Protocol):
    """What the head can offer at this moment; cheap enough to ask per request."""

    def models(self) -> tuple[AvailableModel, ...]:
        """Every model that some live node has, ordered by name."""

    def ready(self) -> bool:
        """At least one node is live."""
