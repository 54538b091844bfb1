"""The ledgers' journals of a cluster, out of the agents' logs: what was promised to whom at every instant."""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# Not in the journal itself: an agent begins, before it takes up what the last one left. What that one had promised and is
# not promised again is over.
BEGAN = "began"
_ENDS = frozenset({"released", "lapsed", "freed"})


class Change(NamedTuple):
    """One entry of one agent's journal. All hosts share one clock, so `at_s` orders the entries of all of them."""

    at_s: float
    host: str
    what: str
    pool_id: str
    bytes: dict[str, int]


def journal_of(logs: dict[str, str]) -> list[Change]:
    """The entries of all logs (by host, of agents at log level debug), oldest first."""
    entries = [change for host, log in logs.items() for change in _entries(host, log)]
    return sorted(entries, key=lambda change: change.at_s)  # stable: one host's entries stay in their order


def _entries(host: str, log: str) -> Iterator[Change]:
    at_s = 0.0
    for line in log.splitlines():
        if '"ledger_changed"' in line:
            entry = json.loads(line)["entry"]
            at_s = entry["at_s"]
            yield Change(at_s, host, entry["change"], entry["pool_id"], entry["bytes"])
        elif '"engine_found"' in line:
            yield Change(at_s, host, BEGAN, "", {})


def promised(changes: Iterable[Change]) -> Iterator[dict[tuple[str, str], int]]:
    """After each change, the bytes promised on every (host, device) that has any."""
    held: dict[tuple[str, str], dict[str, int]] = {}
    for change in changes:
        held.pop((change.host, change.pool_id), None)
        if change.what == BEGAN:
            held = {key: promise for key, promise in held.items() if key[0] != change.host}
        elif change.what not in _ENDS:
            held[change.host, change.pool_id] = change.bytes
        sums: dict[tuple[str, str], int] = {}
        for (host, _), by_device in held.items():
            for device, size in by_device.items():
                sums[host, device] = sums.get((host, device), 0) + size
        yield sums
