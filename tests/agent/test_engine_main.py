"""`python -m agent.engine`, as `sollol engine` runs it: a process of its own."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from agent.engine.built import LLAMA_CPP, build_home
from tests.fakes.engine_source import build_environment, write_program


def engine(*arguments, environment=None, **more):
    return subprocess.run(
        [sys.executable, "-P", "-m", "agent.engine", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment or dict(os.environ),
        **more,
    )


def test_show_without_a_path_or_a_build_names_the_wheel(tmp_path):
    said = engine("show", "--json", "--cache", tmp_path, environment={"PATH": str(tmp_path)})
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["source"] == "XLLAMACPP"


def test_show_of_an_absent_engine_says_what_to_do_and_exits_with_the_reasons_status(tmp_path):
    said = engine("show", "--engine", tmp_path / "absent")
    assert said.returncode == 5
    assert said.stderr.startswith(f"error: the configured engine {tmp_path / 'absent'} is not there")


def test_show_built_answers_by_its_exit_status(tmp_path):
    assert engine("show", "--built", "--cache", tmp_path).returncode == 5
    built = write_program(build_home(tmp_path, LLAMA_CPP) / "bin" / "llama-server")
    said = engine("show", "--built", "--cache", tmp_path)
    assert (said.returncode, said.stdout.strip()) == (0, str(built))


def test_the_cache_is_the_users_unless_given(tmp_path):
    built = write_program(build_home(tmp_path / "sollol", LLAMA_CPP) / "bin" / "llama-server")
    said = engine("show", "--built", environment={"XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert said.stdout.strip() == str(built)


@pytest.mark.engine
def test_show_prints_for_people_and_for_programs(engine_binary):
    said = json.loads(engine("show", "--engine", engine_binary, "--json").stdout)
    assert (said["path"], said["rpc_protocol"], said["devices"]) == (str(engine_binary), "7.0", [])
    text = engine("show", "--engine", engine_binary).stdout
    assert f"rpc      protocol 7.0, backends by {engine_binary.with_name('ggml-rpc-server')}" in text


def test_a_failing_build_shows_why_and_where_the_log_is(tmp_path):
    environment = build_environment(tmp_path)  # in which pip finds no llama.cpp
    said = engine("build", "--cache", tmp_path / "cache", environment=environment)
    assert said.returncode == 5
    assert said.stdout == "fetching\n"
    assert "No matching distribution" in said.stderr
    assert "build.log" in said.stderr.splitlines()[-1]


def test_on_a_terminal_a_build_draws(tmp_path):
    ours, theirs = pty.openpty()
    try:
        arguments = [sys.executable, "-P", "-m", "agent.engine", "build", "--cache", str(tmp_path / "cache")]
        environment = {**build_environment(tmp_path), "TERM": "xterm"}
        said = subprocess.run(
            arguments, env=environment, stdout=theirs, stderr=subprocess.PIPE, timeout=60, check=False
        )
        assert said.returncode == 5
        assert b"fetching" in os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_build_at_once_with_its_children(tmp_path, number):
    """What it started must not go on compiling; the suite's own check finds processes that are left."""
    environment = build_environment(tmp_path)
    hanging = tmp_path / "hanging"
    os.mkfifo(hanging)  # pip opens it as its configuration, and waits
    environment["PIP_CONFIG_FILE"] = str(hanging)
    arguments = [sys.executable, "-P", "-m", "agent.engine", "build", "--cache", str(tmp_path / "cache")]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"fetching\n"
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(timeout=20) == 130
        assert time.monotonic() - began < 7
        assert b"interrupted" in process.stderr.read()
