"""The ledgers' journals of a cluster, out of the agents' logs: what was promised to whom at every instant."""

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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
    entries = [
        Change(entry["at_s"], host, entry["change"], entry["pool_id"], entry["bytes"])
        for host, log in logs.items()
        for entry in _entries(log)
    ]
    return sorted(entries, key=lambda change: change.at_s)  # stable: one host's entries stay in their order


def _entries(log: str) -> Iterator[dict[str, Any]]:
    for line in log.splitlines():
        if '"ledger_changed"' in line:
            yield json.loads(line)["entry"]


def promised(changes: Iterable[Change]) -> Iterator[dict[tuple[str, str], int]]:
    """After each change, the bytes promised on every (host, device) that has any."""
    held: dict[tuple[str, str], dict[str, int]] = {}
    for change in changes:
        held.pop((change.host, change.pool_id), None)
        if change.what not in _ENDS:
            held[change.host, change.pool_id] = change.bytes
        sums: dict[tuple[str, str], int] = {}
        for (host, _), by_device in held.items():
            for device, size in by_device.items():
                sums[host, device] = sums.get((host, device), 0) + size
        yield sums
