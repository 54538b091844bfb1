"""Around every HTTP request: its id, one log line, its place in the metrics, and errors in one form."""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import structlog
from aiohttp import web
from aiohttp.typedefs import Middleware
from sollol.errors import SURFACES, Reason, SollolError, refuse

from sollold.front.openai import envelope, retry_after
from sollold.front.requests import CHAT_PATH, COMPLETION_PATH
from sollold.metrics import Account, Metrics

log = structlog.get_logger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
NODE: web.RequestKey[str] = web.RequestKey("node", str)
POOL: web.RequestKey[str] = web.RequestKey("pool", str)
REASON: web.RequestKey[Reason] = web.RequestKey("reason", Reason)
ACCOUNT: web.RequestKey[Account] = web.RequestKey("account", Account)
KEY_NAME: web.RequestKey[str] = web.RequestKey("key_name", str)

_NOTED: dict[str, web.RequestKey[Any]] = {"node": NODE, "pool": POOL, "key_name": KEY_NAME, "reason": REASON}
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})  # asked again and again
_COUNTED = frozenset({CHAT_PATH, COMPLETION_PATH})


def json_response(
    content: dict[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(content), status=status, headers=headers, content_type="application/json"
    )


def error_response(error: SollolError, status: int | None = None) -> web.Response:
    """Return the error envelope; `status` where HTTP knows better than the reason (404, 405)."""
    refusal = error.refusal
    status = status or SURFACES[refusal.reason].http_status
    content = envelope(error)
    if status == 404:
        content["error"]["type"] = "not_found_error"
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if after := retry_after(refusal, status):
        headers["Retry-After"] = after
    return json_response(content, status=status, headers=headers)


async def add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]


def observed(metrics: Metrics) -> Middleware:
    """Return what answers every failure with an envelope, writes one line when a request has ended, and counts it."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        account = request[ACCOUNT] = metrics.request("http")
        with structlog.contextvars.bound_contextvars(request_id=request[REQUEST_ID]):
            status = 499
            try:
                response = await _answer(request, handler)
                status = response.status
            except asyncio.CancelledError:
                request[REASON] = Reason.CANCELLED
                raise
            finally:
                _write_line(request, status, account.took_s())
                structlog.contextvars.unbind_contextvars("model")
                if request.path in _COUNTED:
                    account.end(request.get(REASON))
        return response

    return observe


def _write_line(request: web.Request, status: int, took_s: float) -> None:
    noted = {name: request[key] for name, key in _NOTED.items() if key in request}
    write = log.debug if request.path in _QUIET else log.info
    write("request_ended", method=request.method, path=request.path, status=status, took_s=round(took_s, 4), **noted)


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    status: int | None = None
    allow: dict[str, str] = {}
    try:
        return await handler(request)
    except SollolError as failure:
        error = failure
    except web.HTTPException as failure:
        if failure.status < 400:
            raise
        status, error = _http_failure(request, failure)
        if "Allow" in failure.headers:
            allow = {"Allow": failure.headers["Allow"]}
    except Exception:
        log.exception("request_failed_unexpectedly")
        error = refuse(Reason.INTERNAL, "the head failed; see its log")
    request[REASON] = error.refusal.reason
    response = error_response(error, status)
    response.headers.update(allow)
    return response


def _http_failure(request: web.Request, failure: web.HTTPException) -> tuple[int | None, SollolError]:
    if isinstance(failure, web.HTTPRequestEntityTooLarge):
        limit = request.client_max_size
        return None, refuse(
            Reason.REQUEST_TOO_LARGE, f"body: larger than {limit} bytes", numbers={"max_body_bytes": limit}
        )
    if failure.status in (404, 405):
        why = "no such route" if failure.status == 404 else f"{request.method} is not for this route"
        return failure.status, refuse(Reason.PATH_NOT_ALLOWED, f"{why}: {request.path[:200]}")
    return failure.status, refuse(Reason.INVALID_REQUEST, failure.reason)
