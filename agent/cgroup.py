"""How much memory our own cgroup leaves us. The system's figures ignore it: a container sees the whole machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_UNLIMITED = 1 << 60  # v1 says "no limit" with a number near 2**63


class CgroupMemory(NamedTuple):
    """The tightest limit on the way to the root, and the least that any level leaves free, in bytes."""

    total_bytes: int
    free_bytes: int


class _Level(NamedTuple):
    """Names of one cgroup version's files; usage includes page cache, which is ours to take.

    The active part too: there are the weights that engines map, and the ledger subtracts what is promised for those.
    """

    limit: str
    usage: str
    cached: tuple[str, str]


_V2 = _Level("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = _Level("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def cgroup_memory(root: Path = Path("/")) -> CgroupMemory | None:
    """Read the limits that apply to this process; None when there are none.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    readings = [reading for folder, level in _levels(root) if (reading := _read(folder, level)) is not None]
    if not readings:
        return None
    return CgroupMemory(min(item.total_bytes for item in readings), min(item.free_bytes for item in readings))


def _levels(root: Path) -> Iterator[tuple[Path, _Level]]:
    """Every folder from our cgroup up to the mount. In a container only the mount may exist, and holds our limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no cgroups
        return
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, level = root / "sys/fs/cgroup/memory", _V1
        elif hierarchy == "0":
            mount, level = root / "sys/fs/cgroup", _V2
        else:
            continue
        folder = mount / path.lstrip("/")
        yield folder, level
        while folder != mount and mount in folder.parents:
            folder = folder.parent
            yield folder, level


def _read(folder: Path, level: _Level) -> CgroupMemory | None:
    try:
        limit = (folder / level.limit).read_text().strip()
        used = int((folder / level.usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):  # not a memory cgroup, as at the root of v2
        return None
    if not limit.isdigit() or int(limit) >= _UNLIMITED:
        return None
    fields = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    used -= sum(int(fields.get(name, 0)) for name in level.cached)
    return CgroupMemory(int(limit), max(0, int(limit) - max(0, used)))
