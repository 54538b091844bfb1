"""`sollol up` starts everything, tells where it is, and leaves nothing behind, however it ends."""

import asyncio
import contextlib
import os
import pwd
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
from sollol.errors import Reason, SollolError

from sollold.cli import up
from sollold.cli.children import is_error, readable
from sollold.cli.machine import check_port, free_memory, http_status, unequal_caps
from tests.waiting import wait_until


class Up:
    """One `sollol up` over stand-in daemons."""

    def __init__(self, process, ends):
        self.process = process
        self._ends = ends

    async def ready(self):
        shown = b""
        while b"Ctrl-C" not in shown:
            line = await asyncio.wait_for(self.process.stdout.readline(), 20)
            assert line, (await self.process.stderr.read()).decode()
            shown += line
        return shown.decode()

    async def end(self, number=None):
        """Exit status and standard error."""
        if number is not None:
            self.process.send_signal(number)
        _, err = await asyncio.wait_for(self.process.communicate(), 20)
        return self.process.returncode, err.decode()

    def ends(self):
        """Names of the daemons that ended when asked to, in order."""
        return self._ends.read_text().split() if self._ends.exists() else []


@pytest.fixture
async def start(tmp_path, ports):
    started = []

    async def up(*words, **environ):
        first, agent = ports(), ports()
        for mark in tmp_path.glob("ends.*.up"):
            mark.unlink()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fakes.up_with_fakes", "up", "--state", str(tmp_path / "state")),
            *("--http-port", str(first), "--grpc-port", str(ports()), "--agent-port", str(agent)),
            *("--redis-url", "redis://127.0.0.1:1/0", *words),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "FAKE_ENDS": str(tmp_path / "ends"), "XDG_RUNTIME_DIR": str(tmp_path), **environ},
        )
        started.append(process)
        return Up(process, tmp_path / "ends")

    yield up
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_stops_the_head_first_then_the_agents_and_is_exit_0(start, number):
    up = await start("--agents", "2", FAKE_SLOW="head")

    shown = await up.ready()
    status, _ = await up.end(number)

    assert "node-1, node-2" in shown
    assert "/v1\n" in shown
    assert status == 0
    assert up.ends()[0] == "head"
    assert {"node-1", "node-2"} == set(up.ends()[1:])


async def test_the_broker_is_passed_to_every_daemon_and_not_on_its_command_line(start):
    up = await start("--verbose", "--mqtt-url", "mqtt://u:p@127.0.0.1:1")
    await up.ready()
    lines = [" ".join(child.cmdline()) for child in psutil.Process(up.process.pid).children()]
    _, errors = await up.end(signal.SIGTERM)

    assert len(lines) == 2
    assert not any("mqtt:" in line for line in lines)
    for name in ("head", "node-1"):
        assert f"{name} | started caps= mqtt=mqtt://u:p@127.0.0.1:1" in errors


async def test_the_services_settings_in_etc_are_not_ours(start):
    up = await start()
    await up.ready()
    lines = [child.cmdline() for child in psutil.Process(up.process.pid).children()]
    await up.end(signal.SIGTERM)

    assert [line[line.index("--config") + 1] for line in lines] == [os.devnull] * 2


@contextlib.contextmanager
def as_an_ordinary_user():
    """Root may read everything; nobody may not."""
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
        yield
    finally:
        os.seteuid(before)


def test_keys_are_where_the_services_settings_say_for_whoever_may_read_these(tmp_path, monkeypatch):
    settings = tmp_path / "head.toml"
    settings.write_text('keys_file = "/srv/keys.json"\n')
    monkeypatch.setattr(up, "DEFAULT_FILE", settings)
    monkeypatch.setenv("SOLLOL_HEAD_STATE_DIR", "/home/me/head")
    assert up.keys_file() == Path("/srv/keys.json")
    settings.chmod(0)
    with as_an_ordinary_user():
        assert up.keys_file() == Path("/home/me/head/keys.json")


async def test_children_end_when_up_is_killed(start):
    up = await start()
    await up.ready()

    up.process.kill()

    await wait_until(lambda: {"head", "node-1"} == set(up.ends()), what="both daemons saw their standard input end")


async def test_a_child_that_dies_stops_everything_with_its_last_words(start):
    up = await start("--agents", "2", FAKE_DIES="node-2", FAKE_DIES_AFTER="head node-1")

    status, err = await up.end()

    assert status == 6
    assert "ENGINE_DIED: node-2 ended by itself with status 1" in err
    assert "node-2 | Traceback: boom" in err
    assert up.ends() == ["head", "node-1"]


async def test_a_child_that_ignores_the_signal_is_killed_in_time(start):
    up = await start(FAKE_DEAF="node-1")
    await up.ready()

    status, err = await up.end(signal.SIGTERM)

    assert status == 0
    assert "node-1 did not stop within 3 s and was killed" in err
    assert up.ends() == ["head"], "an agent that is left over ends by itself"
    assert "left by a daemon" not in err


async def test_errors_in_the_daemons_logs_are_shown_and_the_rest_with_verbose(start, tmp_path):
    up = await start()
    await up.ready()
    _, err = await up.end(signal.SIGINT)
    loud = await start("-v")
    await loud.ready()
    _, all_lines = await loud.end(signal.SIGINT)

    assert "node-1 | complained" in err
    assert "started" not in err
    assert "head | started" in all_lines
    assert (tmp_path / "state" / "log" / "node-1.log").exists()


async def test_one_agent_has_no_cap_and_several_have_unequal_ones(start):
    alone = await start("-v")
    await alone.ready()
    _, of_one = await alone.end(signal.SIGINT)
    several = await start("-v", "--agents", "2")
    await several.ready()
    _, of_two = await several.end(signal.SIGINT)

    assert "node-1 | started caps=\n" in of_one
    caps = [line.partition(" | started caps=CPU=") for line in of_two.splitlines() if "started caps=CPU=" in line]
    assert sorted(name for name, _, _ in caps) == ["node-1", "node-2"]
    assert len({cap for _, _, cap in caps}) == 2


async def test_a_taken_port_is_one_clear_message(start, ports):
    with socket.socket() as taken:
        port = ports()
        taken.bind(("127.0.0.1", port))
        status, err = await (await start("--grpc-port", str(port))).end()

    assert status == 6
    assert f"sollol: PORT_TAKEN: port {port} is taken" in err
    assert err.count("\n") == 1


async def test_a_model_directory_that_is_none_is_refused_before_anything_starts(start, tmp_path):
    status, err = await (await start("--models", str(tmp_path / "none"))).end()

    assert status == 2
    assert "is no directory" in err
    assert not (tmp_path / "state").exists()


def test_caps_are_shares_of_80_percent():
    assert unequal_caps(1) == [None]
    assert unequal_caps(3, 750) == [100, 200, 300]


def test_free_memory_stays_within_the_limit_of_a_container(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    limited = free_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")

    assert limited == 600
    assert free_memory(tmp_path) > 1000
    assert free_memory(tmp_path / "none") > 1000


def test_a_free_port_passes_and_a_privileged_or_taken_one_is_named(ports):
    port = ports()
    check_port("127.0.0.1", port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        with pytest.raises(SollolError, match=str(port)) as caught:
            check_port("127.0.0.1", port)

    assert Reason.PORT_TAKEN is caught.value.refusal.reason


async def test_nobody_listening_is_status_0(ports):
    assert await http_status("127.0.0.1", ports(), "/readyz") == 0


def test_json_log_lines_are_made_readable():
    line = '{"timestamp": "t", "level": "error", "event": "engine_died", "model": "m"}'

    assert readable(line) == "engine_died model=m"
    assert readable("plain text") == "plain text"
    assert [is_error(each) for each in (line, "Traceback", line.replace("error", "info"), " ")] == [
        True,
        True,
        False,
        False,
    ]
