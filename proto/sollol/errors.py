"""Why something was refused or failed: one closed vocabulary for gRPC, HTTP and the CLI."""

from enum import StrEnum
from typing import NamedTuple

from msgspec import Struct, field


class Reason(StrEnum):
    """Closed; equal, name by name, to `sollol.v1.Reason` (a test proves it)."""

    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_MODEL_NAME = "INVALID_MODEL_NAME"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    CONTEXT_TOO_LONG = "CONTEXT_TOO_LONG"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    PATH_NOT_ALLOWED = "PATH_NOT_ALLOWED"
    STALE_REPORT = "STALE_REPORT"
    CORDONED = "CORDONED"
    MODEL_ABSENT = "MODEL_ABSENT"
    MODEL_CORRUPT = "MODEL_CORRUPT"
    MODEL_UNSUPPORTED = "MODEL_UNSUPPORTED"
    ENGINE_MISSING = "ENGINE_MISSING"
    MEMORY_SHORT = "MEMORY_SHORT"
    LABEL_MISSING = "LABEL_MISSING"
    CPUS_SHORT = "CPUS_SHORT"
    NOT_PINNED = "NOT_PINNED"
    NOT_LOCAL = "NOT_LOCAL"
    BACKING_OFF = "BACKING_OFF"
    SCORE_TOO_LOW = "SCORE_TOO_LOW"
    NO_NODES = "NO_NODES"
    NO_FIT = "NO_FIT"
    QUEUE_FULL = "QUEUE_FULL"
    LOAD_TIMEOUT = "LOAD_TIMEOUT"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    AGENT_UNREACHABLE = "AGENT_UNREACHABLE"
    RESERVATION_MISSING = "RESERVATION_MISSING"
    INSTANCE_NOT_FOUND = "INSTANCE_NOT_FOUND"
    INSTANCE_NOT_READY = "INSTANCE_NOT_READY"
    STOPPED = "STOPPED"
    ENGINE_START_FAILED = "ENGINE_START_FAILED"
    ENGINE_DIED = "ENGINE_DIED"
    ENGINE_STALLED = "ENGINE_STALLED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    PORT_TAKEN = "PORT_TAKEN"
    STREAM_TRUNCATED = "STREAM_TRUNCATED"
    STREAM_STALLED = "STREAM_STALLED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"
    NO_CERTIFICATE = "NO_CERTIFICATE"
    FOREIGN_CERTIFICATE = "FOREIGN_CERTIFICATE"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    CERTIFICATE_REVOKED = "CERTIFICATE_REVOKED"
    WRONG_ROLE = "WRONG_ROLE"
    WRONG_NODE = "WRONG_NODE"
    CERTIFICATE_UNREADABLE = "CERTIFICATE_UNREADABLE"
    INVITATION_INVALID = "INVITATION_INVALID"
    INVITATION_EXPIRED = "INVITATION_EXPIRED"
    INVITATION_USED = "INVITATION_USED"
    AGENT_RESTARTING = "AGENT_RESTARTING"
    NODE_ID_IN_USE = "NODE_ID_IN_USE"
    TRANSPORT_MISMATCH = "TRANSPORT_MISMATCH"
    BROKER_UNREACHABLE = "BROKER_UNREACHABLE"
    BROKER_REFUSED = "BROKER_REFUSED"
    KEY_MISSING = "KEY_MISSING"
    KEY_INVALID = "KEY_INVALID"
    KEY_EXPIRED = "KEY_EXPIRED"
    KEY_SCOPE = "KEY_SCOPE"
    KEY_CONCURRENCY = "KEY_CONCURRENCY"
    KEY_TOKENS = "KEY_TOKENS"
    KEYS_UNREADABLE = "KEYS_UNREADABLE"


class Retry(StrEnum):
    """Whether another node, or the same one later, is worth asking."""

    RETRYABLE = "RETRYABLE"
    FATAL = "FATAL"


# In the numbers of a refusal that cannot tell which of so many backends was lost. Their own nodes can.
SUSPECTED_BACKENDS = "suspected_backends"


class Refusal(Struct, frozen=True, kw_only=True):
    """An expected "no".

    Attributes:
        message: What was wrong, where, and what to do about it. For people.
        numbers: The figures behind the message; names carry their unit (`needed_bytes`). For programs.
        retry_after_s: Seconds until asking again makes sense, when known.
        log_lines: The engine's last log lines, oldest first, when an engine failed.
    """

    reason: Reason
    message: str
    retry: Retry = Retry.FATAL
    numbers: dict[str, int] = field(default_factory=dict)
    retry_after_s: float | None = None
    log_lines: tuple[str, ...] = ()


class Surface(NamedTuple):
    """How one reason shows on each surface: HTTP status, OpenAI error type, gRPC status name, CLI exit code."""

    http_status: int
    openai_type: str
    grpc_status: str
    exit_code: int


_BAD = Surface(400, "invalid_request_error", "INVALID_ARGUMENT", 2)
_ABSENT = Surface(404, "not_found_error", "NOT_FOUND", 4)
_BUSY = Surface(503, "unavailable_error", "UNAVAILABLE", 3)
_NO_ROOM = Surface(503, "unavailable_error", "RESOURCE_EXHAUSTED", 5)
_NOT_NOW = Surface(503, "unavailable_error", "FAILED_PRECONDITION", 5)
_FORBIDDEN = Surface(403, "permission_error", "PERMISSION_DENIED", 5)
_UNKNOWN = Surface(401, "authentication_error", "UNAUTHENTICATED", 5)
_TOO_MUCH = Surface(429, "rate_limit_error", "RESOURCE_EXHAUSTED", 3)
_BROKEN = Surface(502, "server_error", "ABORTED", 6)

SURFACES: dict[Reason, Surface] = {
    Reason.INVALID_REQUEST: _BAD,
    Reason.INVALID_MODEL_NAME: _BAD,
    Reason.MODEL_NOT_FOUND: _ABSENT,
    Reason.CONTEXT_TOO_LONG: _BAD,
    Reason.REQUEST_TOO_LARGE: Surface(413, "invalid_request_error", "INVALID_ARGUMENT", 2),
    Reason.PATH_NOT_ALLOWED: _FORBIDDEN,
    Reason.STALE_REPORT: _BUSY,
    Reason.CORDONED: _NOT_NOW,
    Reason.MODEL_ABSENT: _NOT_NOW,
    Reason.MODEL_CORRUPT: Surface(422, "invalid_request_error", "FAILED_PRECONDITION", 5),
    Reason.MODEL_UNSUPPORTED: Surface(422, "invalid_request_error", "FAILED_PRECONDITION", 5),
    Reason.ENGINE_MISSING: _NOT_NOW,
    Reason.MEMORY_SHORT: _NO_ROOM,
    Reason.LABEL_MISSING: _NOT_NOW,
    Reason.CPUS_SHORT: _NOT_NOW,
    Reason.NOT_PINNED: _NOT_NOW,
    Reason.NOT_LOCAL: _NOT_NOW,
    Reason.BACKING_OFF: _BUSY,
    Reason.SCORE_TOO_LOW: _NO_ROOM,
    Reason.NO_NODES: _BUSY,
    Reason.NO_FIT: _NO_ROOM,
    Reason.QUEUE_FULL: Surface(503, "unavailable_error", "RESOURCE_EXHAUSTED", 3),
    Reason.LOAD_TIMEOUT: Surface(503, "unavailable_error", "DEADLINE_EXCEEDED", 3),
    Reason.SHUTTING_DOWN: _BUSY,
    Reason.AGENT_UNREACHABLE: _BUSY,
    Reason.RESERVATION_MISSING: _NOT_NOW,
    Reason.INSTANCE_NOT_FOUND: _ABSENT,
    Reason.INSTANCE_NOT_READY: _BUSY,
    Reason.STOPPED: _BUSY,
    Reason.ENGINE_START_FAILED: _BROKEN,
    Reason.ENGINE_DIED: _BROKEN,
    Reason.ENGINE_STALLED: _BROKEN,
    Reason.OUT_OF_MEMORY: _NO_ROOM,
    Reason.PORT_TAKEN: _BROKEN,
    Reason.STREAM_TRUNCATED: _BROKEN,
    Reason.STREAM_STALLED: _BROKEN,
    Reason.CANCELLED: Surface(499, "cancelled", "CANCELLED", 130),
    Reason.INTERNAL: Surface(500, "server_error", "INTERNAL", 1),
    Reason.NO_CERTIFICATE: _UNKNOWN,
    Reason.FOREIGN_CERTIFICATE: _FORBIDDEN,
    Reason.CERTIFICATE_EXPIRED: _FORBIDDEN,
    Reason.CERTIFICATE_REVOKED: _FORBIDDEN,
    Reason.WRONG_ROLE: _FORBIDDEN,
    Reason.WRONG_NODE: _FORBIDDEN,
    Reason.CERTIFICATE_UNREADABLE: Surface(502, "server_error", "ABORTED", 2),
    Reason.INVITATION_INVALID: _FORBIDDEN,
    Reason.INVITATION_EXPIRED: _FORBIDDEN,
    Reason.INVITATION_USED: _FORBIDDEN,
    Reason.AGENT_RESTARTING: _BUSY,
    Reason.NODE_ID_IN_USE: _NOT_NOW,
    Reason.TRANSPORT_MISMATCH: _NOT_NOW,
    Reason.BROKER_UNREACHABLE: _BUSY,
    Reason.BROKER_REFUSED: _BUSY,
    Reason.KEY_MISSING: _UNKNOWN,
    Reason.KEY_INVALID: _UNKNOWN,
    Reason.KEY_EXPIRED: _UNKNOWN,
    Reason.KEY_SCOPE: _FORBIDDEN,
    Reason.KEY_CONCURRENCY: _TOO_MUCH,
    Reason.KEY_TOKENS: _TOO_MUCH,
    Reason.KEYS_UNREADABLE: _BUSY,
}


class SollolError(Exception):
    """Raised when an operation was refused or failed for a reason of the closed vocabulary."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"{refusal.reason}: {refusal.message}")
        self.refusal = refusal


def refuse(
    reason: Reason,
    message: str,
    *,
    retryable: bool = False,
    numbers: dict[str, int] | None = None,
    retry_after_s: float | None = None,
    log_lines: tuple[str, ...] = (),
) -> SollolError:
    """Build the error that says why not; the caller raises it."""
    return SollolError(
        Refusal(
            reason=reason,
            message=message,
            retry=Retry.RETRYABLE if retryable else Retry.FATAL,
            numbers=numbers or {},
            retry_after_s=retry_after_s,
            log_lines=log_lines,
        )
    )
