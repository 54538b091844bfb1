"""What of a head's request reaches an engine, and what of the engine's response goes back: an allow-list. Pure."""

from collections.abc import Mapping

from sollol.errors import Reason, refuse

from agent.engine_client import request_bytes

ALLOWED = frozenset(
    {
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/completion"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("POST", "/apply-template"),
        # For heads themselves; no head lets its users name a path.
        ("GET", "/health"),
        ("GET", "/props"),
        ("GET", "/slots"),
    }
)
# Never X-Conversation-Id: with it the engine generates on after its reader has gone.
_UP_HEADERS = frozenset({"content-type", "accept"})
DOWN_HEADERS = frozenset({"content-type", "content-length", "retry-after"})


def engine_request(method: str, path: str, headers: Mapping[str, str], body: bytes, ours: Mapping[str, str]) -> bytes:
    """The HTTP request of a stream, with `ours` as further headers.

    Raises:
        SollolError: PATH_NOT_ALLOWED, INVALID_REQUEST.
    """
    if (method, path) not in ALLOWED:
        message = f"{method[:16]} {path[:80]} is not an inference route that agents relay"
        raise refuse(Reason.PATH_NOT_ALLOWED, message)
    passed = {name: text for name, text in headers.items() if name.lower() in _UP_HEADERS}
    for name, text in passed.items():
        if not (text.isascii() and text.isprintable()):
            raise refuse(Reason.INVALID_REQUEST, f"header {name} has characters that HTTP does not allow")
    return request_bytes(method, path, {**passed, **ours}, body)
