"""Failures as people at a terminal need them: one line of what, one of what to do, and the exit code of the reason."""

import sys

from sollol.errors import SURFACES, Reason, Refusal, SollolError

HINTS: dict[Reason, str] = {
    Reason.AGENT_UNREACHABLE: (
        "is it running? `sollol up` starts everything on one machine; --head or $SOLLOL_HEAD names another head"
    ),
    Reason.MODEL_NOT_FOUND: "`sollol models` lists what there is",
    Reason.NO_NODES: "`sollol nodes` shows what the head sees",
    Reason.NO_FIT: "`sollol place MODEL` shows every node; try a smaller --context or --parallel, or unload something",
    Reason.KEY_MISSING: "put your key into $SOLLOL_KEY; whoever runs the head makes one with `sollol keys add NAME`",
    Reason.ENGINE_MISSING: "`sollol engine build` builds one",
}


def report_failure(error: Exception) -> int:
    """Print `error` on stderr without a traceback and return the exit status."""
    if isinstance(error, SollolError):
        return report_refusal(error.refusal)
    if isinstance(error, OSError):
        sys.stderr.write(f"sollol: {error.strerror or error}{f': {error.filename}' if error.filename else ''}\n")
        return 2
    sys.stderr.write(f"sollol: this is a bug: {type(error).__name__}: {error}\n  --debug shows where\n")
    return 1


def report_refusal(refusal: Refusal) -> int:
    sys.stderr.write(f"sollol: {refusal.reason}: {refusal.message}\n")
    for line in refusal.log_lines:
        sys.stderr.write(f"  | {line}\n")
    hint = HINTS.get(refusal.reason)
    if hint and hint not in refusal.message:
        sys.stderr.write(f"  {hint}\n")
    return SURFACES[refusal.reason].exit_code
