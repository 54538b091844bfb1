"""SOLLOL as services of booted machines: the shipped units in a real systemd, with a model split over three nodes."""

import signal
import time
from typing import Any

import pytest

from tests.cluster.seed import await_true
from tests.nspawn.service import HEAD, LARGE, SMALL, Services
from tests.tiny_model import EOS, RECITAL

MODEL = "tiny-reciter"
READY_AGAIN_S = 5.0
PARTS = {HEAD: 2, LARGE: 2, SMALL: 2}  # a backend with its forwarder, the coordinator with its end of the tunnel

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.timeout(600)]


def pool(services: Services) -> dict[str, Any]:
    """The coordinator, as the head sees it; empty while it is not connected to that node."""
    return services.instances(MODEL).get(LARGE, {})


def parts(services: Services) -> dict[str, dict[int, str]]:
    return {address: services.parts(machine) for address, machine in services.machines.items()}


@pytest.fixture
def loaded(services):
    """The model is up; returns the pids of its parts by address."""
    services.load(MODEL)
    return parts(services)


def test_the_units_run_as_they_were_installed(services):
    for address, machine in services.machines.items():
        for unit in ("sollol-agent", "sollold")[: 2 if address == HEAD else 1]:
            assert machine.must("systemctl", "is-active", unit).strip() == "active"
            assert machine.must("systemctl", "is-enabled", unit).strip() == "enabled"
            assert machine.shows(unit, "NRestarts") == "0"
            assert "INSECURE" not in machine.journal(unit)
        paths = ("/etc/sollol/agent.toml", "/etc/sollol/pki/agent/node.key", "/var/lib/sollol", "/run/sollol")
        owners = machine.must("stat", "-c", "%U:%G %a %n", *paths)
        assert owners.splitlines() == [
            "root:sollol 640 /etc/sollol/agent.toml",
            "sollol:sollol 600 /etc/sollol/pki/agent/node.key",
            "sollol:sollol 700 /var/lib/sollol",
            "sollol:sollol 700 /run/sollol",
        ]


def test_where_the_kernel_limits_no_memory_in_the_agents_cgroup_log_and_report_say_so(services):
    for address, machine in services.machines.items():
        said = next(node["engines_unlimited"] for node in services.nodes() if node["host"] == address)
        controllers = machine.run(
            "cat", f"/sys/fs/cgroup{machine.shows('sollol-agent', 'ControlGroup')}/cgroup.controllers"
        )
        assert (said == "") == ("memory" in controllers.stdout.split())
        assert ("engines_unlimited" in machine.journal("sollol-agent")) == (said != "")


def test_the_list_of_the_revoked_reaches_every_machine_although_their_etc_is_read_only(services):
    head = services.machines[HEAD]
    head.must("sollol", "pki", "issue", "client", "somebody")
    head.must("sollol", "pki", "revoke", "somebody", "--role", "client")
    signed = head.must("cat", "/etc/sollol/pki/authority/revoked")
    kept = "/etc/sollol/pki/agent/revoked"
    for address, machine in services.machines.items():
        await_true(lambda there=machine: there.run("cat", kept).stdout == signed, 10, f"{address} has the list")
        assert machine.must("stat", "-c", "%U", kept).strip() == "sollol"
        assert "revoked_list_not_kept" not in machine.journal("sollol-agent")


def test_a_model_on_three_nodes_answers_and_systemd_knows_what_is_done(services, loaded):
    assert {address: len(found) for address, found in loaded.items()} == PARTS

    assert services.answer(MODEL) == RECITAL
    head = services.machines[HEAD]
    await_true(lambda: head.shows("sollold", "StatusText") == "3 nodes, 1 pools, 0 streams", 30, "the head's status")
    await_true(lambda: "1 engines" in services.machines[LARGE].shows("sollol-agent", "StatusText"), 30, "its agent's")


@pytest.mark.parametrize("address", [LARGE, SMALL])
def test_a_restart_of_an_agent_in_mid_stream_leaves_its_engines_and_the_pool_is_ready_again(services, loaded, address):
    machine, before = services.machines[address], pool(services)
    main_pid = machine.shows("sollol-agent", "MainPID")

    with services.streaming(MODEL, logit_bias={str(EOS): -100}) as stream:
        seen = len(stream.events)
        restarted_s = time.monotonic()
        machine.must("systemctl", "restart", "sollol-agent")
        await_true(
            lambda: [item["state"] for item in services.instances(MODEL).values()] == ["READY"] * len(PARTS),
            READY_AGAIN_S,
            "all parts of the pool are ready again",
        )
        took_s = time.monotonic() - restarted_s
        await_true(
            lambda: stream.error or len(stream.events) > seen + 200,
            READY_AGAIN_S,
            "the stream goes on, or ends with an error",
        )
        assert stream.error is None or stream.error["code"] == "AGENT_RESTARTING", stream.error

    assert took_s < READY_AGAIN_S
    assert machine.shows("sollol-agent", "MainPID") != main_pid
    assert parts(services) == loaded, "no engine, forwarder or tunnel was started anew"
    assert services.answer(MODEL) == RECITAL
    assert pool(services)["instance_id"] == before["instance_id"], "served warm"


def test_a_reload_changes_settings_and_nothing_else(services, loaded):
    machine = services.machines[SMALL]
    main_pid = machine.shows("sollol-agent", "MainPID")
    machine.write("/etc/sollol/agent.toml", services.agent_settings(SMALL) + 'labels = { rack = "7" }\n')

    machine.must("systemctl", "reload", "sollol-agent")

    def labels():
        return next(node["labels"] for node in services.nodes() if node["host"] == SMALL)

    await_true(lambda: labels() == {"rack": "7"}, 20, "the label is reported")
    machine.write("/etc/sollol/agent.toml", services.agent_settings(SMALL) + "lables = {}\n")
    machine.must("systemctl", "reload", "sollol-agent")
    await_true(lambda: "reload_refused" in machine.journal("sollol-agent"), 20, "the wrong setting is refused")
    assert labels() == {"rack": "7"}
    assert machine.shows("sollol-agent", "ActiveState") == "active"
    assert machine.shows("sollol-agent", "MainPID") == main_pid
    machine.write("/etc/sollol/agent.toml", services.agent_settings(SMALL))
    machine.must("systemctl", "reload", "sollol-agent")
    assert parts(services) == loaded


def test_an_agent_that_hangs_is_ended_by_the_watchdog_and_the_next_one_takes_over_its_engines(services, loaded):
    """Without a head, since a head gives up the pool of a lender that is silent for five seconds; the next one finds it."""
    machine, head = services.machines[SMALL], services.machines[HEAD]
    restarts, before = int(machine.shows("sollol-agent", "NRestarts")), pool(services)
    head.must("systemctl", "stop", "sollold")

    machine.must("systemctl", "kill", "--kill-whom=main", f"--signal={signal.SIGSTOP.name}", "sollol-agent")

    await_true(lambda: int(machine.shows("sollol-agent", "NRestarts")) == restarts + 1, 60, "it was started again")
    await_true(lambda: machine.shows("sollol-agent", "SubState") == "running", 60, "it serves")
    for line in ("Watchdog timeout", "instance_adopted"):
        await_true(lambda line=line: line in machine.journal("sollol-agent"), 20, f"the journal has {line}")
    head.must("systemctl", "start", "sollold")
    await_true(lambda: len(services.instances(MODEL)) == len(PARTS), 60, "the new head sees all parts")
    assert parts(services) == loaded
    assert services.answer(MODEL) == RECITAL
    assert pool(services)["instance_id"] == before["instance_id"]


def test_an_agent_whose_settings_are_wrong_is_not_tried_again_and_again(services, loaded):
    machine = services.machines[SMALL]
    restarts = machine.shows("sollol-agent", "NRestarts")
    machine.write("/etc/sollol/agent.toml", "prot = 7462\n")

    assert machine.run("systemctl", "restart", "sollol-agent").returncode != 0

    assert machine.shows("sollol-agent", "ActiveState") == "failed"
    assert machine.shows("sollol-agent", "ExecMainStatus") == "2"
    assert machine.shows("sollol-agent", "NRestarts") in ("0", restarts)
    line = 'unknown setting "prot"; the closest one is "port"'
    await_true(lambda: line in machine.journal("sollol-agent", lines=20), 20, "the journal says what is wrong")
    machine.write("/etc/sollol/agent.toml", services.agent_settings(SMALL))
    machine.must("systemctl", "restart", "sollol-agent")
    await_true(lambda: services.instances(MODEL).get(SMALL), 60, "it is back, and its backend is still there")
    assert parts(services) == loaded


def test_a_stop_of_everything_leaves_no_process(services, loaded):
    assert all(loaded.values())

    for address, machine in services.machines.items():
        units = ("sollold", "sollol-agent") if address == HEAD else ("sollol-agent",)
        machine.must("systemctl", "stop", *units, timeout_s=90)

    for machine in services.machines.values():
        await_true(lambda machine=machine: not machine.pids_of("sollol"), 30, "every process of ours is gone")
        await_true(lambda machine=machine: machine.shows("sollol-engines", "ActiveState") == "inactive", 30, "stopped")
        assert machine.shows("sollol-engines", "Result") == "success"


def test_uninstalling_leaves_settings_and_no_unit(services):
    machine = services.machines[SMALL]

    machine.must("sollol", "systemd", "uninstall")

    assert machine.shows("sollol-agent", "LoadState") == "not-found"
    assert sorted(machine.must("ls", "/etc/sollol").split()) == ["agent.toml", "pki"]
