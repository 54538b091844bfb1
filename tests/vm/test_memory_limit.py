"""The kernel limits what an engine takes: real cgroups of version 2, with a memory controller, in the systemd of two Debians."""

from typing import Any

import pytest

from tests.cluster.seed import await_true
from tests.tiny_model import RECITAL
from tests.vm.service import TREE, USER_TREE, WAIT_S, Node, on_each_machine

MODEL = "tiny-reciter"
MIB = 1 << 20
LEAST_BYTES = 512 * MIB  # of room for each engine, beside what was planned for it
TAKES = 8 * MIB
# A process that moves into a cgroup, and says after each of its steps how many bytes it has taken by now.
EATER = f"""
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
held = []
while True:
    held.append(bytearray(b"x" * {TAKES}))
    print(len(held) * {TAKES}, flush=True)
"""

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.timeout(600)]


def cgroup_of(engine: dict[str, Any]) -> str:
    return f"engine-{engine['instance_id']}"


def planned_bytes(engine: dict[str, Any]) -> int:
    return sum(share["total_bytes"] for share in engine["shares"])


@on_each_machine
def test_an_engine_has_a_cgroup_of_its_own_beside_the_agents_with_room_for_what_was_planned(node: Node):
    engine = node.engine(MODEL)
    agent = int(node.machine.shows("sollol-agent", "MainPID"))

    assert node.report()["engines_unlimited"] == ""
    assert node.cgroup_of(engine["pid"]) == f"/system.slice/sollol-agent.service/{cgroup_of(engine)}"
    assert node.cgroup_of(agent) == "/system.slice/sollol-agent.service/agent"
    limit = int(node.held(cgroup_of(engine), "memory.max"))
    assert planned_bytes(engine) + LEAST_BYTES <= limit <= 2 * planned_bytes(engine) + LEAST_BYTES
    assert node.held(cgroup_of(engine), "memory.oom.group") == "1"
    assert RECITAL.startswith(node.answer(MODEL))


@on_each_machine
def test_an_engine_outlives_an_agent_that_was_killed_and_is_limited_by_the_next_one(node: Node):
    engine = node.engine(MODEL)
    agent, limit = node.machine.shows("sollol-agent", "MainPID"), node.held(cgroup_of(engine), "memory.max")

    node.machine.must("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "sollol-agent")

    await_true(lambda: node.machine.shows("sollol-agent", "MainPID") not in (agent, "0"), WAIT_S, "another agent")
    await_true(lambda: node.machine.shows("sollol-agent", "SubState") == "running", WAIT_S, "it serves")
    await_true(lambda: node.instance().get("pid") == engine["pid"], WAIT_S, "the engine is ready as it was")
    assert node.cgroup_of(engine["pid"]).endswith(f"/{cgroup_of(engine)}")
    assert node.held(cgroup_of(engine), "memory.max") == limit
    assert node.held(cgroup_of(engine), "memory.oom.group") == "1"
    assert RECITAL.startswith(node.answer(MODEL))


@on_each_machine
def test_an_engine_that_takes_more_is_ended_by_the_kernel_alone_and_its_next_one_serves(node: Node):
    engine = node.engine(MODEL)
    agent, limit = node.machine.shows("sollol-agent", "MainPID"), int(node.held(cgroup_of(engine), "memory.max"))

    eaten = node.machine.run("python3", "-c", EATER, f"{TREE}/{cgroup_of(engine)}", timeout_s=WAIT_S)

    assert eaten.returncode, eaten.stdout
    assert limit - planned_bytes(engine) - TAKES <= int(eaten.stdout.split()[-1]) <= limit
    await_true(lambda: node.failure(engine["instance_id"]), WAIT_S, "the head is told")
    refusal = node.failure(engine["instance_id"])
    assert refusal["reason"] == "OUT_OF_MEMORY"
    assert refusal["numbers"] == {"limit_bytes": limit}
    assert node.machine.shows("sollol-agent", "MainPID") == agent
    assert node.machine.shows("sollol-agent", "ActiveState") == "active"
    await_true(
        lambda: node.machine.run("test", "-e", f"{TREE}/{cgroup_of(engine)}").returncode, 20, "nothing is left of it"
    )

    following = node.load(MODEL)
    assert following["pid"] != engine["pid"]
    assert int(node.held(cgroup_of(following), "memory.max")) == limit
    assert RECITAL.startswith(node.answer(MODEL))


@on_each_machine
def test_a_stop_leaves_no_engine_and_no_cgroup(node: Node):
    engine = node.engine(MODEL)
    node.machine.must("systemctl", "stop", "sollol-agent", "sollol-engines", timeout_s=WAIT_S)

    await_true(lambda: node.machine.run("test", "-e", f"/proc/{engine['pid']}").returncode, 20, "the engine has ended")
    await_true(lambda: node.machine.run("test", "-e", TREE).returncode, 20, "its cgroup is gone")


@on_each_machine
def test_an_engine_of_a_users_own_service_is_limited_too_over_a_restart(node: Node):
    node.install_for_a_user()
    engine = node.load(MODEL)
    limit = node.held(cgroup_of(engine), "memory.max", USER_TREE)
    assert int(limit) >= planned_bytes(engine) + LEAST_BYTES

    node.as_user("systemctl", "--user", "restart", "sollol-agent")

    await_true(lambda: node.instance().get("pid") == engine["pid"], WAIT_S, "the engine is ready as it was")
    assert node.report()["engines_unlimited"] == ""
    assert node.held(cgroup_of(engine), "memory.max", USER_TREE) == limit
    node.as_user("systemctl", "--user", "stop", "sollol-agent", "sollol-engines")
    await_true(lambda: node.machine.run("test", "-e", f"/proc/{engine['pid']}").returncode, 20, "the engine has ended")
