from pathlib import Path

import pytest

from agent.cgroup import CgroupMemory, cgroup_memory
from tests.fakes.sysfs import write_tree

NO_LIMIT = 9223372036854771712


def v2(limit: int | str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str | int]:
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}"
    return {"memory.max": limit, "memory.current": usage, "memory.stat": stat}


def v1(limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str | int]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}


def test_the_tightest_level_on_the_way_to_the_root_counts(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "0::/system.slice/agent.service"})
    write_tree(tmp_path / "sys/fs/cgroup/system.slice", v2(1000, 950))
    write_tree(tmp_path / "sys/fs/cgroup/system.slice/agent.service", v2(800, 500, inactive=100))
    assert cgroup_memory(tmp_path) == CgroupMemory(total_bytes=800, free_bytes=50)


def test_page_cache_that_nobody_uses_is_ours_to_take(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "0::/a"})
    write_tree(tmp_path / "sys/fs/cgroup/a", v2(1000, 900, inactive=600))
    assert cgroup_memory(tmp_path) == CgroupMemory(1000, 700)


def test_weights_that_an_engine_has_mapped_are_not_counted_as_used_beside_their_promise(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "4:memory:/b\n0::/a"})
    write_tree(tmp_path / "sys/fs/cgroup/a", v2(1000, 900, inactive=100, active=600))
    assert cgroup_memory(tmp_path) == CgroupMemory(1000, 800)
    write_tree(tmp_path / "sys/fs/cgroup/memory/b", v1(1000, 950, inactive=50, active=600))
    assert cgroup_memory(tmp_path) == CgroupMemory(1000, 700)


def test_version_1_is_read_from_its_own_hierarchy_beside_an_empty_version_2(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "4:memory:/box/a\n1:cpu,cpuacct:/box\n0::/"})
    write_tree(tmp_path / "sys/fs/cgroup/memory/box/a", v1(NO_LIMIT, 10))
    write_tree(tmp_path / "sys/fs/cgroup/memory/box", v1(500, 300, inactive=100))
    assert cgroup_memory(tmp_path) == CgroupMemory(500, 300)


def test_in_a_container_whose_path_is_not_mounted_the_mount_itself_counts(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "4:memory:/docker/0123"})
    write_tree(tmp_path / "sys/fs/cgroup/memory", v1(500, 100))
    assert cgroup_memory(tmp_path) == CgroupMemory(500, 400)


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path):
    write_tree(tmp_path, {"proc/self/cgroup": "0::/a"})
    write_tree(tmp_path / "sys/fs/cgroup/a", v2(100, 900))
    assert cgroup_memory(tmp_path) == CgroupMemory(100, 0)


@pytest.mark.parametrize("limit", ["max", NO_LIMIT, "garbage"])
def test_no_limit_is_none(tmp_path: Path, limit: int | str):
    write_tree(tmp_path, {"proc/self/cgroup": "0::/a"})
    write_tree(tmp_path / "sys/fs/cgroup/a", v2(limit, 1))
    assert cgroup_memory(tmp_path) is None


def test_a_system_without_cgroups_has_no_limit(tmp_path: Path):
    assert cgroup_memory(tmp_path) is None


def test_this_machine_can_be_read():
    found = cgroup_memory()
    assert found is None or 0 <= found.free_bytes <= found.total_bytes
