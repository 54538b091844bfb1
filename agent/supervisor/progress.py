"""Load progress, read from what a coordinator in child mode prints. Pure.

The protocol is llama.cpp's own between its router and children, undocumented: a line that is not understood is skipped,
and readiness never depends on it.
"""

from msgspec import DecodeError, Struct, ValidationError, json

_PREFIX = b"cmd_child_to_router:state:"


class _Payload(Struct):
    stages: tuple[str, ...] = ()
    current: str = ""
    value: float = 0.0


class _State(Struct):
    state: str
    payload: _Payload | None = None


_DECODER = json.Decoder(_State)


def percent_of(line: bytes) -> float | None:
    """Return 0 to 100 from one line of standard output; None when the line says nothing of progress."""
    if not line.startswith(_PREFIX):
        return None
    try:
        said = _DECODER.decode(line[len(_PREFIX) :])
    except (DecodeError, ValidationError):
        return None
    if said.state == "ready":
        return 100.0
    if said.state != "loading" or said.payload is None:
        return None
    return _overall(said.payload)


def _overall(payload: _Payload) -> float:
    """Each stage (text model, projector, draft model) counts the same: the engine does not say how big they are."""
    stages = payload.stages or (payload.current,)
    done = stages.index(payload.current) if payload.current in stages else 0
    return 100.0 * (done + min(max(payload.value, 0.0), 1.0)) / len(stages)


def newest_percent(output: bytes) -> tuple[float | None, int]:
    """Return the last percent in `output`, and how many of its bytes are whole lines and need not be read again."""
    whole = output.rfind(b"\n") + 1
    found = [percent for line in output[:whole].split(b"\n") if (percent := percent_of(line)) is not None]
    return (found[-1] if found else None), whole
