import asyncio
import signal
import sys
import time

import psutil
import pytest

from agent.engine.ask import ask, end_group, start
from tests.waiting import wait_until

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def is_running(pid: str) -> bool:
    """A zombie is not: orphans become our children here, and we do not wait for them."""
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_an_answer_has_both_streams_and_the_status():
    answer = await ask(("/bin/sh", "-c", "echo out; echo err >&2; exit 3"), ENVIRONMENT)
    assert (answer.status, answer.output, answer.errors) == (3, "out\n", "err\n")
    assert answer.trouble == "exit status 3: err"


async def test_a_binary_that_hangs_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    began = time.monotonic()
    answer = await ask(("/bin/sh", "-c", f"sleep 600 & echo $! $$ >{pids}; wait"), ENVIRONMENT, within_s=0.5)
    assert answer.status is None
    assert "within 0.5 s" in answer.trouble
    assert time.monotonic() - began < 20
    await wait_until(lambda: not any(map(is_running, pids.read_text().split())), what="all are gone")


@pytest.mark.parametrize("output", [">/dev/null 2>&1", ""], ids=["silent", "holds our pipe"])
async def test_what_a_binary_leaves_behind_when_it_ends_by_itself_is_killed_too(tmp_path, output):
    pid = tmp_path / "pid"
    answer = await ask(("/bin/sh", "-c", f"sleep 600 {output} & echo $! >{pid}; echo yes"), ENVIRONMENT, within_s=2)
    assert answer.output == ("yes\n" if output else "")
    await wait_until(lambda: not is_running(pid.read_text()), what="it is gone")


async def test_a_child_that_outlives_a_gentle_end_of_its_leader_is_killed(tmp_path):
    pids = tmp_path / "pids"
    ignores = f"trap '' TERM; echo $$ >{pids}.new; mv {pids}.new {pids}; sleep 600"
    process = await asyncio.create_subprocess_exec("/bin/sh", "-c", f'sh -c "{ignores}" & wait', start_new_session=True)
    await wait_until(pids.exists, what="both run")
    await end_group(process, grace_s=20)
    assert process.returncode == -signal.SIGTERM
    await wait_until(lambda: not is_running(pids.read_text()), what="it is gone")


async def test_one_that_is_cancelled_while_it_starts_leaves_no_child(tmp_path):
    """A program may have begun before asyncio has its pipes."""
    pid = tmp_path / "pid"
    starting = asyncio.create_task(
        start(("/bin/sh", "-c", f"sleep 600 & echo $! >{pid}; wait"), ENVIRONMENT, errors=asyncio.subprocess.STDOUT)
    )
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the process is made, and is not ours yet
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    found = pid.read_text().strip() if pid.exists() else ""
    await wait_until(lambda: not found or not is_running(found), what="it is gone")


async def test_what_cannot_be_run_is_an_answer_and_no_exception(tmp_path):
    (tmp_path / "text").write_text("not a program")
    assert (await ask((str(tmp_path / "absent"),), ENVIRONMENT)).trouble == "cannot be run: No such file or directory"
    assert (await ask((str(tmp_path / "text"),), ENVIRONMENT)).trouble == "cannot be run: Permission denied"


async def test_it_reads_nothing_from_our_input_and_sees_only_the_given_environment():
    code = "import os, sys; print(sorted(os.environ), sys.stdin.read() == '')"
    answer = await ask((sys.executable, "-I", "-c", code), {"LC_CTYPE": "C.UTF-8"})
    assert answer.output.strip() == "['LC_CTYPE'] True"


async def test_a_cancelled_question_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    asking = asyncio.create_task(
        ask(("/bin/sh", "-c", f"echo $$ >{pid}.new; mv {pid}.new {pid}; sleep 600"), ENVIRONMENT)
    )
    await wait_until(pid.exists, what="it runs")
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert not psutil.pid_exists(int(pid.read_text()))
