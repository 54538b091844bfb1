"""What happened to a node's pools between two reports. Pure."""

from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct
from sollol.report import InstanceState

from agent.presence.state import PoolState

_BROKEN = frozenset({InstanceState.FAILED, InstanceState.LOST, InstanceState.BACKOFF})


class Event(Struct, frozen=True, kw_only=True):
    """`event`: start, ready, lost (it failed or died; `reason` says how) or stopped (somebody wanted it)."""

    event: str
    unix_s: float
    node_id: str
    pool_id: str
    model: str
    number: int
    reason: str = ""
    message: str = ""


def events_between(before: Mapping[str, PoolState], now: Iterable[PoolState], unix_s: float) -> Iterator[Event]:
    """What happened, pool by pool; `before` is by pool id."""
    seen = set()
    for pool in now:
        seen.add(pool.pool_id)
        last = before.get(pool.pool_id)
        if last is None and pool.state is not InstanceState.STARTING:
            yield _event("start", pool, unix_s)  # it was over before a report could say so
        if last is None or last.state is not pool.state:
            name = _name(pool.state, restarted=last is not None and last.state in _BROKEN)
            if name:
                yield _event(name, pool, unix_s)
    for pool_id, last in before.items():
        if pool_id not in seen and last.state not in _BROKEN:
            yield _event("stopped", last, unix_s)


def _name(state: InstanceState, *, restarted: bool) -> str:
    if state is InstanceState.READY:
        return "ready"
    if state in _BROKEN:
        return "" if restarted else "lost"
    return "start" if state is InstanceState.STARTING else ""


def _event(name: str, pool: PoolState, unix_s: float) -> Event:
    return Event(
        event=name,
        unix_s=unix_s,
        node_id=pool.node_id,
        pool_id=pool.pool_id,
        model=pool.model,
        number=pool.number,
        reason=pool.reason if name == "lost" else "",
        message=pool.message if name == "lost" else "",
    )
