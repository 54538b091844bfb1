"""Engines' own cgroups, each with a memory limit, in the part of cgroup v2's tree that systemd has given to the agent.

A node of that tree which passes controllers on must hold no process itself, so the agent's unit starts it in a leaf
beside them, `agent`. Anywhere else engines stay in the agent's cgroup, and `unlimited` says why.
"""

import asyncio
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import structlog
from msgspec import Struct

from agent.supervisor.allowance import limit_bytes
from agent.supervisor.files import plain_name

log = structlog.get_logger(__name__)

LEAF = "agent"
_PREFIX = "engine-"
_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")  # the latter where version 1 is there too
_GONE_WITHIN_S = 2.0
_POLL_S = 0.01


class Delegation(Struct, frozen=True, kw_only=True):
    """`tree` is where cgroups can be made, None: nowhere. `unlimited`: why they have no limits; empty: they have."""

    tree: Path | None
    unlimited: str


def own_path(proc_cgroup: str) -> str | None:
    """The path in version 2's hierarchy out of /proc/self/cgroup; None where there is no such hierarchy."""
    return next((line[3:] for line in proc_cgroup.splitlines() if line.startswith("0::")), None)


def delegation(root: Path = Path("/")) -> Delegation:
    """Look at our own cgroup, and have memory limits passed on to its siblings where that is ours to do.

    Args:
        root: Where `proc` and `sys` are mounted.
    """
    try:
        path = own_path((root / "proc/self/cgroup").read_text())
    except OSError:
        path = None
    mount = next((root / name for name in _MOUNTS if (root / name / "cgroup.controllers").exists()), None)
    if path is None or mount is None:
        return Delegation(tree=None, unlimited="this system has no cgroup v2; boot it with the unified hierarchy")
    leaf = mount / path.lstrip("/")
    if leaf.name != LEAF or leaf == mount:
        why = f"the agent's cgroup, {path}, is not one that a unit has made for it beside its engines'"
        return Delegation(tree=None, unlimited=f"{why}; `sollol systemd install --agent` writes one that does")
    return _delegated(leaf.parent)


def _delegated(tree: Path) -> Delegation:
    needed = (tree, tree / "cgroup.procs", tree / "cgroup.subtree_control")
    if not all(os.access(path, os.W_OK) for path in needed):
        return Delegation(tree=None, unlimited=f"{tree} is not the agent's to write; its unit needs Delegate=yes")
    if (tree / "cgroup.procs").read_text().strip():
        why = f"processes of an earlier agent are in {tree} itself; `systemctl stop sollol-agent`, then start it"
        return Delegation(tree=None, unlimited=why)
    if "memory" not in (tree / "cgroup.controllers").read_text().split():
        return Delegation(tree=tree, unlimited=f"{tree} has no memory controller; its unit needs Delegate=yes")
    try:
        (tree / "cgroup.subtree_control").write_text("+memory")
    except OSError as error:
        return Delegation(tree=tree, unlimited=f"{tree} does not pass memory limits on: {error.strerror}")
    return Delegation(tree=tree, unlimited="")


class EngineCgroup:
    """That of one instance.

    Args:
        folder: It exists while the engine runs; None: it has none.
        limit_bytes: None: no limit.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes

    def take_in(self, pid: int) -> None:
        """Make it, and move a process there that has just been started. The engine serves without it, too."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(exist_ok=True)
            self._limit(self._folder)
            (self._folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            log.warning("engine_unlimited", cgroup=str(self._folder), pid=pid, problem=str(error))

    def take_over(self) -> None:
        """Limit an engine that an earlier agent has put there: before systemd 254 its limit ended with that agent."""
        if self._folder is None or not self._folder.exists():
            return
        try:
            self._limit(self._folder)
        except OSError as error:
            log.warning("engine_unlimited", cgroup=str(self._folder), problem=str(error))

    def _limit(self, folder: Path) -> None:
        if self._limit_bytes is not None:
            (folder / "memory.max").write_text(str(self._limit_bytes))
            (folder / "memory.oom.group").write_text("1")

    def out_of_memory(self) -> int | None:
        """The limit in bytes when the kernel has ended the engine for want of memory; None when it has not."""
        if self._folder is None:
            return None
        try:
            events = dict(line.split() for line in (self._folder / "memory.events").read_text().splitlines())
            limit = (self._folder / "memory.max").read_text().strip()
        except OSError:  # no memory controller
            return None
        killed = int(events.get("oom_kill", 0)) + int(events.get("oom_group_kill", 0))
        return int(limit) if killed and limit.isdigit() else None

    async def remove(self) -> None:
        """End whatever of the engine has left its group, and remove the cgroup when that is gone."""
        if self._folder is None or not self._folder.exists():
            return
        with suppress(OSError):  # a kernel before 5.14: its group has been ended in any case
            (self._folder / "cgroup.kill").write_text("1")
        until = asyncio.get_running_loop().time() + _GONE_WITHIN_S
        while (problem := _removed(self._folder)) is not None:
            if asyncio.get_running_loop().time() > until:
                log.warning("engine_cgroup_left", cgroup=str(self._folder), problem=str(problem))
                return
            await asyncio.sleep(_POLL_S)


class EngineCgroups:
    """All of this agent's. What earlier ones left empty is removed.

    Args:
        unified: The GPUs that have no memory of their own, as far as it is known.
    """

    def __init__(self, found: Delegation, unified: Callable[[], Container[str]] = frozenset) -> None:
        self.unlimited, self._unified = found.unlimited, unified
        self._tree = found.tree
        if self.unlimited:
            log.info("engines_unlimited", why=self.unlimited, own_cgroups=self._tree is not None)
        for folder in self._present():
            _removed(folder)  # those of engines that run are not empty

    def of(self, instance_id: str, reserved: Mapping[str, int], passing_bytes: int = 0) -> EngineCgroup:
        """That of an instance, whoever made it; see `limit_bytes`."""
        if self._tree is None:
            return EngineCgroup()
        limit = None if self.unlimited else limit_bytes(reserved, passing_bytes, self._unified())
        return EngineCgroup(self._tree / f"{_PREFIX}{plain_name(instance_id)}", limit)

    def _present(self) -> Iterator[Path]:
        return iter(()) if self._tree is None else self._tree.glob(f"{_PREFIX}*/")


def _removed(folder: Path) -> OSError | None:
    """Why it could not be removed; None when it is gone."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


NO_CGROUPS = EngineCgroups(Delegation(tree=None, unlimited=""))
"""For supervisors that nobody gives any."""
