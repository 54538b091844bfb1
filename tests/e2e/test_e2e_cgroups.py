"""An agent in a leaf of a tree of cgroups, as its unit puts it there; whether memory is limited in it is the kernel's choice."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.supervisor.cgroups import LEAF, own_path
from tests.e2e.models import RECITER
from tests.tiny_model import RECITAL

pytestmark = [pytest.mark.engine, pytest.mark.root]
MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def path_of(pid: int | str) -> str:
    return own_path(Path(f"/proc/{pid}/cgroup").read_text()) or ""


@pytest.fixture
def tree() -> Iterator[Path]:
    """Empty but for the agent's leaf; what is in there has ended when it goes."""
    mount = next(path for path in MOUNTS if (path / "cgroup.controllers").exists())
    made = mount / f"sollol-e2e-{os.getpid()}"
    (made / LEAF).mkdir(parents=True)
    yield made
    for inner, _, _ in os.walk(made, topdown=False):
        Path(inner).rmdir()


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """What is started meanwhile is in that cgroup."""
    mount, before = folder.parents[1], path_of("self")
    (folder / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (mount / before.lstrip("/") / "cgroup.procs").write_text("0")


@pytest.fixture
async def cluster(tree, by_hand):
    with inside(tree / LEAF):
        by_hand.start_agent("delegated")
    by_hand.start_head()
    await by_hand.nodes_seen(1)
    yield by_hand
    by_hand.close()  # before the tree goes


async def test_an_engine_is_beside_its_agent_and_whoever_has_no_limit_says_why(cluster, tree):
    assert RECITAL.startswith(await cluster.say(RECITER, max_tokens=4))
    pool = await cluster.ready_pool(RECITER)

    assert path_of(pool.instance.pid) == f"/{tree.name}/engine-{pool.instance.instance_id}"
    assert path_of(cluster.processes["delegated"].pid) == f"/{tree.name}/{LEAF}"
    assert Path(f"/proc/{pool.instance.pid}/oom_score_adj").read_text().strip() == "300"

    cluster.start_agent("plain")
    await cluster.nodes_seen(2)
    _, out, _ = await cluster.cli("nodes", "--json")
    why = {node["report"]["node_id"]: node["report"]["engines_unlimited"] for node in json.loads(out)["nodes"]}
    assert "has no memory controller" in why["delegated"] or not why["delegated"]
    assert "is not one that a unit has made for it" in why["plain"]
    assert why["plain"] in cluster.log("plain")
    _, table, _ = await cluster.cli("nodes")
    (line,) = [line for line in table.splitlines() if line.startswith("plain ")]
    assert line.endswith("(no memory limit)")
