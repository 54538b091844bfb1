"""Why an engine ended. Pure.

llama-server's exit status says nothing (1 for nearly everything), so its last log lines must.
"""

import re
import signal
from typing import NamedTuple

from msgspec.structs import replace
from sollol.errors import SUSPECTED_BACKENDS, Reason, Refusal, Retry
from sollol.report import BackendEndpoint

KEPT_LINES = 20


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    reason: Reason
    retry: Retry
    advice: str


def _rule(pattern: str, reason: Reason, retry: Retry, advice: str) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), reason, retry, advice)


_OUT_OF_MEMORY = _rule(
    r"insufficient memory|(failed|unable) to allocate|out of memory|std::bad_alloc|cudaMalloc failed",
    Reason.OUT_OF_MEMORY,
    Retry.RETRYABLE,
    "there was not enough memory for it; use fewer slots, a shorter context or another node",
)

# What a coordinator says before it aborts because of a backend; the endpoint only when it could not even connect.
_BACKEND_LOST = re.compile(r"Remote RPC server crashed or returned malformed response|Failed to connect to (?P<at>\S+)")
_BACKEND_OTHER = re.compile(r"RPC handshake failed for (?P<at>\S+)")

# The first rule that matches any line wins: a failed allocation also ends in "error loading model".
_AT_START = (
    _OUT_OF_MEMORY,
    _rule(
        r"couldn't bind HTTP server socket",
        Reason.PORT_TAKEN,
        Retry.RETRYABLE,
        "its socket or port is taken; look for an engine that was started by hand",
    ),
    _rule(
        r"failed to open GGUF file .*No such file",
        Reason.MODEL_ABSENT,
        Retry.RETRYABLE,
        "the file is not there any more",
    ),
    _rule(
        r"unknown model architecture|unknown pre-tokenizer type|unsupported model|unknown tokenizer|invalid ggml type",
        Reason.MODEL_UNSUPPORTED,
        Retry.FATAL,
        "this engine does not know its architecture; use a newer engine",
    ),
    _rule(
        r"invalid magic characters|not within the file bounds|corrupted|failed to read|wrong number of tensors"
        r"|tensor '.*' not found|error loading model",
        Reason.MODEL_CORRUPT,
        Retry.FATAL,
        "its file is damaged or incomplete; fetch it again",
    ),
    _rule(
        r"RPC not supported in this build",
        Reason.ENGINE_MISSING,
        Retry.RETRYABLE,
        "it cannot use other nodes; use one that is built with GGML_RPC, such as `sollol engine build` makes",
    ),
    _rule(
        r"error: invalid argument|error while handling argument",
        Reason.ENGINE_START_FAILED,
        Retry.RETRYABLE,
        "the engine does not take our command line; use a newer engine",
    ),
)


def classify(
    exit_code: int | None,
    log_tail: tuple[str, ...],
    *,
    was_ready: bool,
    model: str,
    backends: tuple[BackendEndpoint, ...] = (),
) -> Refusal:
    """Say why an engine that nobody stopped has ended.

    Args:
        exit_code: The status, or minus the signal's number; None when only an earlier agent could have learned it.
        log_tail: Its last log lines, oldest first.
        was_ready: Whether it had been serving.
        model: For the message.
        backends: What it was connected to.
    """
    rules = (_OUT_OF_MEMORY,) if was_ready else _AT_START
    # A served engine logs its clients' errors too: only what it said at the very end explains its death.
    lines = log_tail[-5:] if was_ready else log_tail
    rule = next((rule for rule in rules if any(rule.pattern.search(line) for line in lines)), None)
    doing = "while it was serving" if was_ready else "before it was ready"
    what = f"the engine of {model} ended {doing} ({ended(exit_code)})"
    if backends and (fault := _backend_fault(lines, backends)) is not None:
        reason, why, suspects = fault
        refusal = _refusal(reason, Retry.RETRYABLE, f"{what}: {why}", exit_code, log_tail)
        return refusal if suspects == 1 else replace(refusal, numbers={**refusal.numbers, SUSPECTED_BACKENDS: suspects})
    if rule is not None:
        return _refusal(rule.reason, rule.retry, f"{what}: {rule.advice}", exit_code, log_tail)
    if was_ready or (exit_code or 0) < 0:
        hint = "; the kernel does this when memory runs out" if exit_code == -signal.SIGKILL else ""
        return _refusal(Reason.ENGINE_DIED, Retry.RETRYABLE, what + hint, exit_code, log_tail)
    return _refusal(Reason.ENGINE_START_FAILED, Retry.RETRYABLE, f"{what}: see its log", exit_code, log_tail)


def _backend_fault(lines: tuple[str, ...], backends: tuple[BackendEndpoint, ...]) -> tuple[Reason, str, int] | None:
    """Return the reason, its words, and how many nodes it may have been."""
    for line in lines:
        if found := _BACKEND_LOST.search(line):
            nodes = _nodes(backends, found["at"])
            why = f"its backend on {' or '.join(nodes)} was lost; place the model again"
            return Reason.ENGINE_DIED, why, len(nodes)
        if found := _BACKEND_OTHER.search(line):
            nodes = _nodes(backends, found["at"])
            why = f"the backend on {' or '.join(nodes)} speaks another protocol; use the same engine build"
            return Reason.ENGINE_START_FAILED, why, len(nodes)
    return None


def _nodes(backends: tuple[BackendEndpoint, ...], endpoint: str | None = None) -> list[str]:
    """Return the node at `endpoint`; without one every node that it may have been, in the order of the plan."""
    named = [backend.node_id for backend in backends if f"{backend.host}:{backend.port}" == endpoint]
    return list(dict.fromkeys(named or [backend.node_id for backend in backends]))


def backend_lost(model: str, backend: BackendEndpoint, log_tail: tuple[str, ...]) -> Refusal:
    """Say that a served coordinator was ended because its connection to a backend is gone."""
    message = f"the engine of {model} lost its backend on {backend.node_id}; place the model again"
    return Refusal(reason=Reason.ENGINE_DIED, message=message, retry=Retry.RETRYABLE, log_lines=log_tail[-KEPT_LINES:])


def unreachable(
    model: str, backends: tuple[BackendEndpoint, ...], waited_s: float, log_tail: tuple[str, ...]
) -> Refusal:
    """Say that a coordinator was given up because it hung while it connected to its backends."""
    nodes = " or ".join(_nodes(backends))
    message = f"the engine of {model} waited {waited_s:.0f} s for its backend on {nodes}; see their logs"
    return _stalled(message, waited_s, log_tail)


def ended(exit_code: int | None) -> str:
    """Return "exit status 1" or "SIGKILL"."""
    if exit_code is None:
        return "its exit status is not known: an earlier agent had started it"
    if exit_code >= 0:
        return f"exit status {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"


def stalled(model: str, waited_s: float, log_tail: tuple[str, ...]) -> Refusal:
    """Say that a start was given up because nothing moved for `waited_s` seconds."""
    message = f"the engine of {model} made no progress for {waited_s:.0f} s while loading; see its log"
    return _stalled(message, waited_s, log_tail)


def frozen(model: str, wrong: str, log_tail: tuple[str, ...]) -> Refusal:
    """Say that a coordinator was ended because it lived and did nothing."""
    return Refusal(
        reason=Reason.ENGINE_STALLED,
        message=f"the engine of {model} was ended: it {wrong}; ask again, and another one is started",
        retry=Retry.RETRYABLE,
        log_lines=log_tail[-KEPT_LINES:],
    )


def no_tunnel(model: str, wrong: str, log_tail: tuple[str, ...]) -> Refusal:
    """Say that a coordinator was ended, or not started, because nothing carries its bytes to its backends."""
    message = f"the engine of {model} was ended: it {wrong}; ask again, and another one is started"
    return Refusal(reason=Reason.ENGINE_DIED, message=message, retry=Retry.RETRYABLE, log_lines=log_tail[-KEPT_LINES:])


def over_limit(model: str, limit_bytes: int, log_tail: tuple[str, ...]) -> Refusal:
    """Say that the kernel ended an engine that has a memory limit of its own."""
    advice = "use fewer slots, a shorter context or another node"
    return Refusal(
        reason=Reason.OUT_OF_MEMORY,
        message=f"the engine of {model} {killed_for_memory(limit_bytes)}; {advice}",
        retry=Retry.RETRYABLE,
        numbers={"limit_bytes": limit_bytes},
        log_lines=log_tail[-KEPT_LINES:],
    )


def killed_for_memory(limit_bytes: int) -> str:
    """The kernel's counters do not tell which of the two ran out."""
    return f"was ended by the kernel: the {limit_bytes} bytes that it may use, or the node's memory, ran out"


def _stalled(message: str, waited_s: float, log_tail: tuple[str, ...]) -> Refusal:
    return Refusal(
        reason=Reason.ENGINE_STALLED,
        message=message,
        retry=Retry.RETRYABLE,
        numbers={"waited_s": int(waited_s)},
        log_lines=log_tail[-KEPT_LINES:],
    )


def _refusal(reason: Reason, retry: Retry, message: str, exit_code: int | None, log_tail: tuple[str, ...]) -> Refusal:
    numbers = {} if exit_code is None else {"exit_code": exit_code}
    return Refusal(reason=reason, message=message, retry=retry, numbers=numbers, log_lines=log_tail[-KEPT_LINES:])
