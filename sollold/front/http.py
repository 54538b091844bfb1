"""The OpenAI-compatible HTTP front.

An engine's stream passes through untouched. The head speaks itself only where the engine cannot: while the model
loads (comments), and when a stream breaks (an error event, never a silent end).
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import structlog
from aiohttp import web
from sollol.errors import Reason, SollolError, refuse
from sollol.names import closest

from sollold.admission import Admission
from sollold.front import requests
from sollold.front.assemble import Assembly
from sollold.front.authorization import CALLER, authorization
from sollold.front.departure import Departure
from sollold.front.events import ClientGoneError, EventResponse
from sollold.front.metrics import PATH as METRICS_PATH
from sollold.front.metrics import MetricsPage
from sollold.front.observe import ACCOUNT, NODE, POOL, REASON, add_request_id, json_response, observed
from sollold.front.openai import envelope, find_model, model_entry, model_list
from sollold.front.opening import ProgressBoard, opened, refuse_engine_error
from sollold.front.sse import Ending, EventReader, Passage, comment, event
from sollold.streams import Catalogue, Dispatcher, EngineStream

log = structlog.get_logger(__name__)

# A stream that has not begun after this long hears why, and again after each further such time.
WORD_EVERY_S = 1.0
# After the grace period: for the last events to leave.
LAST_WORDS_S = 1
# For the next request of a connection to arrive whole, the first one too; aiohttp's own is an hour.
KEEPALIVE_S = 75
# For the whole body of a request to arrive.
BODY_WITHIN_S = 60


def build_app(
    dispatcher: Dispatcher,
    catalogue: Catalogue,
    admission: Admission,
    page: MetricsPage,
    *,
    max_body_bytes: int,
    shutdown_grace_s: float,
) -> web.Application:
    """Return the application with all routes of the front; at its shutdown requests have `shutdown_grace_s` to end."""
    departure = Departure(shutdown_grace_s)
    front = HttpFront(dispatcher, catalogue, admission, page, departure)
    app = web.Application(
        middlewares=[observed(page.metrics), authorization(admission)], client_max_size=max_body_bytes
    )
    app.on_response_prepare.append(add_request_id)
    app.on_shutdown.append(lambda _: departure.leave())
    app.router.add_post(requests.CHAT_PATH, front.chat)
    app.router.add_post(requests.COMPLETION_PATH, front.completion)
    app.router.add_get("/v1/models", front.models)
    app.router.add_get("/v1/models/{name:.+}", front.model)
    app.router.add_get(METRICS_PATH, front.metrics)
    app.router.add_get("/healthz", front.alive)
    app.router.add_get("/readyz", front.ready)
    return app


async def serve(app: web.Application, host: str, port: int, tls: ssl.SSLContext | None = None) -> web.AppRunner:
    """Listen, with HTTPS only where there is `tls`, and return the runner.

    Its `cleanup()` stops listening and ends every request.

    Raises:
        OSError: the address cannot be listened on.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,  # a user who leaves while the engine is silent is noticed at once
        shutdown_timeout=LAST_WORDS_S,
        keepalive_timeout=KEEPALIVE_S,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


class HttpFront:
    """The handlers."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        catalogue: Catalogue,
        admission: Admission,
        page: MetricsPage,
        departure: Departure,
    ) -> None:
        self._dispatcher = dispatcher
        self._admission = admission
        self._page = page
        self._departure = departure
        self._catalogue = catalogue

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, requests.chat)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, requests.completion)

    async def models(self, request: web.Request) -> web.StreamResponse:
        return json_response(model_list(self._admission.visible(request[CALLER], self._catalogue.models())))

    async def model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        models = self._admission.visible(request[CALLER], self._catalogue.models())
        found = find_model(models, name)
        if found is None:
            near = closest(name, {known for model in models for known in (model.name, *model.aliases)})
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise refuse(Reason.MODEL_NOT_FOUND, f"no node has a model named {name[:200]!r}{hint}")
        return json_response(model_entry(found))

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self._admission.check_sees_all(request[CALLER])
        return await self._page.answer(request.headers.get("Accept", ""))

    async def alive(self, _request: web.Request) -> web.StreamResponse:
        return json_response({"status": "ok"})

    async def ready(self, _request: web.Request) -> web.StreamResponse:
        if not self._catalogue.ready():
            raise refuse(Reason.NO_NODES, "no live node: start `sollol-agent` on one", retryable=True, retry_after_s=2)
        return json_response({"status": "ready"})

    async def _generate(
        self, request: web.Request, check: Callable[[dict[str, Any]], requests.Asked]
    ) -> web.StreamResponse:
        asked = check(requests.decode_body(await _body(request)))
        structlog.contextvars.bind_contextvars(model=asked.engine.model)
        account = request[ACCOUNT]
        account.model = asked.engine.model
        permit = self._admission.permit(request[CALLER], asked.engine.model)
        board = ProgressBoard()
        async with opened(self._dispatcher, asked.engine, board, permit, account) as opening:
            if asked.stream:
                return await self._stream(request, opening, board)
            with self._departure.running():
                stream = await opening
                answer = await _whole(request, stream, asked.engine.path)
            return json_response(answer, headers=_origin(request, stream))

    async def _stream(
        self, request: web.Request, opening: asyncio.Task[EngineStream], board: ProgressBoard
    ) -> web.StreamResponse:
        client = EventResponse(request)
        try:
            try:
                with self._departure.running(), _bugs_as_refusals():
                    await _wait(client, opening, board)
                    await _pass_on(client, opening.result(), request)
            except SollolError as error:
                if not client.started:
                    raise
                request[REASON] = error.refusal.reason
                await client.send(event(msgspec.json.encode(envelope(error))))
            return await client.finish()
        except ClientGoneError:
            request[REASON] = Reason.CANCELLED
            return client.response


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            return await request.read()
    except TimeoutError:
        raise refuse(Reason.INVALID_REQUEST, f"body: did not arrive within {BODY_WITHIN_S} s") from None
    except web.RequestPayloadError as error:
        raise refuse(Reason.INVALID_REQUEST, f"body: cannot be read: {error}") from None


def _origin(request: web.Request, stream: EngineStream) -> dict[str, str]:
    request[NODE], request[POOL] = stream.node_id, stream.instance_id
    return {"x-sollol-node": stream.node_id, "x-sollol-pool": stream.instance_id}


async def _whole(request: web.Request, stream: EngineStream, path: str) -> dict[str, Any]:
    _origin(request, stream)
    await refuse_engine_error(stream)
    reader, assembly = EventReader(), Assembly(path)
    async for chunk in stream:
        for data in reader.feed(chunk):
            assembly.feed(data)
    if not assembly.complete:
        raise _truncated(stream)
    return assembly.result()


async def _wait(client: EventResponse, opening: asyncio.Task[EngineStream], board: ProgressBoard) -> None:
    await asyncio.wait({opening}, timeout=WORD_EVERY_S)
    while not opening.done():
        await client.start()
        await client.send(comment(board.text()))
        await asyncio.wait({opening}, timeout=WORD_EVERY_S)


@contextlib.contextmanager
def _bugs_as_refusals() -> Iterator[None]:
    """Once a response has begun, an error can only be an event of it."""
    try:
        yield
    except (SollolError, ClientGoneError):
        raise
    except Exception as error:
        log.exception("stream_failed_unexpectedly")
        raise refuse(Reason.INTERNAL, "the head failed in mid-stream; see its log") from error


async def _pass_on(client: EventResponse, stream: EngineStream, request: web.Request) -> None:
    origin = _origin(request, stream)
    await refuse_engine_error(stream)
    await client.start(origin)
    passage = Passage()
    async for chunk in stream:
        whole = passage.feed(chunk)
        if whole:
            await client.send(whole)
    rest, ending = passage.finish()
    if ending is Ending.TRUNCATED:
        raise _truncated(stream)
    if ending is Ending.ERROR:
        request[REASON] = Reason.INTERNAL
    if rest:
        await client.send(rest)


def _truncated(stream: EngineStream) -> SollolError:
    return refuse(
        Reason.STREAM_TRUNCATED,
        f"the engine of {stream.instance_id} on {stream.node_id} ended its answer early; ask again",
        retryable=True,
    )
