"""Who sends an HTTP request, known before its body is read: every route that is not named here needs it."""

from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware
from sollol.config import is_loopback
from sollol.errors import Reason, refuse

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
            if caller.key is None:
                _check_is_no_foreign_page(request)
            request[CALLER] = caller
            if caller.name:
                request[KEY_NAME] = caller.name
        return await handler(request)

    return authorized


def _check_is_no_foreign_page(request: web.Request) -> None:
    """Where nobody needs a key, only programs and pages of this machine may ask.

    Browsers let every page send requests to this machine, and read the answers under a name that its owner points here
    (DNS rebinding, as CVE-2024-28224 of Ollama). Off loopback an operator has said that everybody may ask.

    Raises:
        SollolError: KEY_MISSING.
    """
    address = request.get_extra_info("sockname")
    if not address or not is_loopback(address[0]):
        return
    origin = request.headers.get("Origin")
    for what, host in (
        ("a page of", None if origin is None else _name(origin)),
        ("a request to", _name(f"//{request.host}")),
    ):
        if host is not None and not is_loopback(host):
            raise refuse(
                Reason.KEY_MISSING,
                f"{what} {host[:100]!r} came without an API key, and without one only this machine may ask, as "
                "localhost: make a key with `sollol keys add NAME`",
            )


def _name(url: str) -> str:
    """The host of a URL; empty for what is none, as the `null` of pages that hide where they are from."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def bearer(header: str | None) -> str | None:
    """The token of an `Authorization: Bearer TOKEN`."""
    scheme, _, token = (header or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _api_key(request: web.Request) -> str | None:
    return request.headers.get("X-Api-Key") or None
