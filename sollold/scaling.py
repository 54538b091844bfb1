"""When another pool of a model is loaded, and for whom. Pure.

One load of a model at a time: the next one is placed on what the last one left, and what is to come may be enough.
"""

from enum import StrEnum

from msgspec import Struct

MAX_POOLS = 64  # of one model
EXTRA_RETRY_FIRST_S = 5.0
EXTRA_RETRY_MOST_S = 120.0


class LoadFor(StrEnum):
    """Whose wish a load is."""

    REQUESTS = "REQUESTS"
    OPERATOR = "OPERATOR"


class Demand(Struct, frozen=True, kw_only=True):
    """One model's queue and its pools, those of other heads included.

    Attributes:
        waiting: A request waits, so that no ready pool has a free slot.
        asked: How many pools operators wait for.
        ready: Pools that are usable.
        to_come: Pools that may become so: they start, load or wait for their agent's word, whoever started them.
        limit: How many pools requests alone may bring up.
        held_off: A load beyond the first failed a moment ago.
    """

    waiting: bool
    asked: int
    ready: int
    to_come: int
    limit: int
    held_off: bool = False


def load_for(demand: Demand) -> LoadFor | None:
    """For whom a pool is to be loaded now; None when none is."""
    if demand.to_come:
        return None
    if demand.waiting and (demand.ready == 0 or (demand.ready < demand.limit and not demand.held_off)):
        return LoadFor.REQUESTS
    return LoadFor.OPERATOR if demand.asked > demand.ready else None


def extra_retry_s(failures: int, retry_after_s: float | None) -> float:
    """How long to leave it at the pools there are, after so many failed loads beyond the first in a row.

    Args:
        failures: At least 1.
        retry_after_s: What the last failure asked for.
    """
    doubled = EXTRA_RETRY_FIRST_S * 2.0 ** min(failures - 1, 16)
    return min(max(doubled, retry_after_s or 0.0), EXTRA_RETRY_MOST_S)
