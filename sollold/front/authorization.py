"""Who sends an HTTP request, known before its body is read: every route that is not named here needs it."""

from aiohttp import web
from aiohttp.typedefs import Middleware

from sollold.admission import Admission, Caller
from sollold.front.observe import KEY_NAME, Handler

CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
# Probes of load balancers and supervisors: they say only whether the head is well.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})


def authorization(admission: Admission) -> Middleware:
    """Return what refuses a request without a good key, where one is needed."""

    @web.middleware
    async def authorized(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in OPEN_PATHS:
            caller = admission.authenticate(bearer(request.headers.get("Authorization")) or _api_key(request))
            request[CALLER] = caller
            if caller.name:
                request[KEY_NAME] = caller.name
        return await handler(request)

    return authorized


def bearer(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer TOKEN`."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _api_key(request: web.Request) -> str | None:
    return request.headers.get("X-Api-Key") or None
