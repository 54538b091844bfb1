"""Engines' own cgroups: found in a tree of plain files, and used in this machine's own hierarchy, which limits no memory."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sollol.errors import Reason
from sollol.report import InstanceState
from structlog.testing import capture_logs

from agent.supervisor.allowance import limit_bytes
from agent.supervisor.cgroups import Delegation, EngineCgroup, EngineCgroups, delegation, own_path
from tests.fakes.fake_engine import fake_engine
from tests.fakes.sysfs import write_tree
from tests.supervised import plan_of, runs, settled, started, supervising
from tests.waiting import wait_until

UNIT = "sys/fs/cgroup/system.slice/sollol-agent.service"
MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def delegated(root: Path, *, own: str = "/system.slice/sollol-agent.service/agent", **files: str) -> Path:
    """A tree as our unit leaves it, and version 2's kernel shows it."""
    unit = {"cgroup.controllers": "cpu memory pids", "cgroup.procs": "", "cgroup.subtree_control": ""}
    unit |= {name.replace("_", ".", 1): content for name, content in files.items()}
    write_tree(root, {"proc/self/cgroup": f"0::{own}", "sys/fs/cgroup/cgroup.controllers": "cpu memory"})
    write_tree(root / UNIT, unit)
    (root / UNIT / "agent").mkdir()
    return root / UNIT


def test_our_path_is_that_of_version_2():
    assert own_path("4:memory:/box\n1:name=systemd:/x\n0::/a/agent\n") == "/a/agent"
    assert own_path("4:memory:/box\n") is None


def test_where_systemd_made_a_leaf_for_the_agent_limits_are_passed_on_to_its_engines(tmp_path: Path):
    tree = delegated(tmp_path)

    assert delegation(tmp_path) == Delegation(tree=tree, unlimited="")
    assert (tree / "cgroup.subtree_control").read_text() == "+memory"


@pytest.mark.parametrize("own", ["/system.slice/sollol-agent.service", "/user.slice/session-1.scope", "/", "/../.."])
def test_in_any_other_cgroup_there_are_no_limits_and_nothing_is_touched(tmp_path: Path, own: str):
    tree = delegated(tmp_path, own=own)

    found = delegation(tmp_path)

    assert found.tree is None
    assert f"the agent's cgroup, {own}, is not one that a unit has made for it" in found.unlimited
    assert (tree / "cgroup.subtree_control").read_text() == "\n"


def test_a_unit_whose_own_cgroup_still_holds_engines_of_an_earlier_agent_passes_nothing_on(tmp_path: Path):
    tree = delegated(tmp_path, cgroup_procs="4711")

    assert "processes of an earlier agent are in" in delegation(tmp_path).unlimited
    assert (tree / "cgroup.subtree_control").read_text() == "\n"


def test_without_a_memory_controller_engines_have_cgroups_and_no_limits(tmp_path: Path):
    tree = delegated(tmp_path, cgroup_controllers="hugetlb")

    found = delegation(tmp_path)
    EngineCgroups(found).of("p", {"CPU": 1000}).take_in(4711)

    assert found.tree == tree
    assert "has no memory controller" in found.unlimited
    assert not (tree / "engine-p/memory.max").exists()
    assert (tree / "engine-p/cgroup.procs").read_text() == "4711"


def test_without_version_2_there_are_no_limits(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "4:memory:/box"})

    assert delegation(tmp_path) == Delegation(
        tree=None, unlimited="this system has no cgroup v2; boot it with the unified hierarchy"
    )
    assert delegation(tmp_path / "no-linux").tree is None


def test_an_engine_is_limited_as_a_whole(tmp_path: Path):
    tree = delegated(tmp_path)

    EngineCgroups(delegation(tmp_path)).of("p", {"CPU": 1000}).take_in(4711)

    held = {path.name: path.read_text() for path in (tree / "engine-p").iterdir()}
    assert held == {"memory.max": str(limit_bytes({"CPU": 1000})), "memory.oom.group": "1", "cgroup.procs": "4711"}


def test_what_a_gpu_takes_of_the_nodes_memory_is_allowed_to_its_engine(tmp_path: Path):
    tree = delegated(tmp_path)
    reserved = {"CPU": 1000, "Vulkan0": 9000}

    EngineCgroups(delegation(tmp_path), lambda: {"Vulkan0"}).of("p", reserved).take_in(4711)

    limit = int((tree / "engine-p/memory.max").read_text())
    assert limit == limit_bytes(reserved, unified={"Vulkan0"}) > limit_bytes(reserved)


def test_an_id_never_becomes_more_than_a_plain_name(tmp_path: Path):
    tree = delegated(tmp_path)

    EngineCgroups(delegation(tmp_path)).of("../../p", {}).take_in(4711)

    (made,) = tree.glob("engine-*")
    assert made.name.isascii()
    assert "." not in made.name


def test_that_engines_are_not_limited_is_said_once_and_why():
    with capture_logs() as logs:
        cgroups = EngineCgroups(Delegation(tree=None, unlimited="it is old"))
        cgroups.of("p", {"CPU": 1000}).take_in(os.getpid())

    assert logs == [{"event": "engines_unlimited", "log_level": "info", "why": "it is old", "own_cgroups": False}]


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ("oom 1\noom_kill 3\noom_group_kill 1", 1000),
        ("oom 1\noom_kill 0\noom_group_kill 1", 1000),
        ("oom 5\noom_kill 0\noom_group_kill 0", None),
        ("oom 5", None),
    ],
)
def test_the_kernel_counts_whom_it_ended_for_want_of_memory(tmp_path: Path, events: str, found: int | None):
    write_tree(tmp_path / "engine-p", {"memory.events": events, "memory.max": 1000})

    assert EngineCgroup(tmp_path / "engine-p").out_of_memory() == found


def test_without_a_limit_nobody_was_ended_for_it(tmp_path: Path):
    write_tree(tmp_path / "engine-p", {"memory.events": "oom_kill 1", "memory.max": "max"})

    assert EngineCgroup(tmp_path / "engine-p").out_of_memory() is None
    assert EngineCgroup(tmp_path / "engine-q").out_of_memory() is None
    assert EngineCgroup().out_of_memory() is None


async def test_an_engine_that_the_kernel_ended_at_its_limit_ran_out_of_memory(tmp_path: Path):
    tree = delegated(tmp_path / "machine")
    cgroups = EngineCgroups(delegation(tmp_path / "machine"))
    async with supervising(tmp_path, fake_engine(), cgroups=cgroups) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        limit = int((tree / "engine-p/memory.max").read_text())
        (tree / "engine-p/memory.events").write_text("oom 1\noom_kill 1\noom_group_kill 1\n")

        os.kill(pid, signal.SIGKILL)

        await wait_until(lambda: supervisor.failure_of("p"), what="its end is seen")
        refusal = supervisor.failure_of("p")
        for plain_file in (tree / "engine-p").iterdir():  # which no kernel removes with the folder
            plain_file.unlink()
    assert refusal.reason is Reason.OUT_OF_MEMORY
    assert refusal.numbers == {"limit_bytes": limit}
    assert f"the {limit} bytes that it may use" in refusal.message


async def test_the_kernel_ends_an_engine_before_its_agent(tmp_path: Path):
    async with supervising(tmp_path, fake_engine()) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid

        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "300"


@pytest.fixture
def real_tree() -> Iterator[Path]:
    mount = next(path for path in MOUNTS if (path / "cgroup.controllers").exists())
    tree = mount / f"sollol-test-{os.getpid()}"
    tree.mkdir()
    yield tree
    for inner, _, _ in os.walk(tree, topdown=False):
        Path(inner).rmdir()


def held_by(folder: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    return []


@pytest.mark.root
async def test_an_engine_lives_in_its_cgroup_over_a_restart_and_takes_it_along(tmp_path: Path, real_tree: Path):
    found = Delegation(tree=real_tree, unlimited="no memory controller")
    (real_tree / "engine-of-long-ago").mkdir()
    async with supervising(tmp_path, fake_engine(), cgroups=EngineCgroups(found)) as supervisor:
        pid = (await started(supervisor, "p", plan_of("m"))).pid
        assert held_by(real_tree / "engine-p") == [pid]
        await supervisor.close(leave=True)
    assert [path.name for path in real_tree.glob("engine-*")] == ["engine-p"]

    async with supervising(tmp_path, fake_engine(), cgroups=EngineCgroups(found)) as supervisor:
        assert supervisor.adopt() == 1
        assert (await settled(supervisor, "p")).state is InstanceState.READY
        assert held_by(real_tree / "engine-p") == [pid]
        await supervisor.stop("p")
        assert list(real_tree.glob("engine-*")) == []


@pytest.mark.root
async def test_what_has_left_its_engines_group_ends_with_the_cgroup(tmp_path: Path, real_tree: Path):
    cgroups = EngineCgroups(Delegation(tree=real_tree, unlimited="no memory controller"))
    async with supervising(tmp_path, fake_engine(), cgroups=cgroups) as supervisor:
        await started(supervisor, "p", plan_of("m"))
        with subprocess.Popen(["sleep", "60"], start_new_session=True) as stray:
            (real_tree / "engine-p/cgroup.procs").write_text(str(stray.pid))

            await supervisor.stop("p")

            assert stray.wait(5) == -signal.SIGKILL
    assert not (real_tree / "engine-p").exists()
    assert not runs(stray.pid)
