"""A process that is there and does nothing is told from one that has nothing to do."""

import os
import signal
import socket
import subprocess

from agent.supervisor.freeze import IDLE_FOR_S, FreezeWatch, Look, look_at
from tests.waiting import wait_until

STOPPED = Look(state="T", cpu_ticks=5, has_work=False)
ASLEEP_WITH_INPUT = Look(state="S", cpu_ticks=5, has_work=True)


def watched(*looks, computes_here=True):
    """What a watch says of looks a second apart."""
    watch = FreezeWatch(computes_here=computes_here)
    return [watch.sees(look, float(at)) for at, look in enumerate(looks)]


def test_a_process_that_is_seen_stopped_twice_is_frozen():
    assert watched(STOPPED, STOPPED)[1]


def test_one_that_goes_on_between_two_looks_is_not():
    assert not any(watched(STOPPED, STOPPED._replace(state="S"), STOPPED))


def test_one_that_sleeps_beside_its_unread_input_is_frozen_within_five_seconds():
    said = watched(*[ASLEEP_WITH_INPUT] * 6)

    assert not any(said[: int(IDLE_FOR_S) + 1])
    assert "input" in said[4]


def test_an_idle_one_is_well_for_ever_though_it_never_answered():
    assert not any(watched(*[ASLEEP_WITH_INPUT._replace(has_work=False)] * 60))


def test_one_that_computes_while_input_waits_is_well():
    assert not any(watched(*(ASLEEP_WITH_INPUT._replace(cpu_ticks=at) for at in range(60))))


def test_one_that_waits_for_its_turn_or_for_the_disk_is_well():
    for state in ("R", "D"):
        assert not any(watched(*[ASLEEP_WITH_INPUT._replace(state=state)] * 60))


def test_one_that_waits_for_a_gpu_is_well():
    assert not any(watched(*[ASLEEP_WITH_INPUT] * 60, computes_here=False))


def test_one_that_is_gone_is_not_frozen():
    assert look_at(2**22 + 1) is None
    assert not any(watched(None, None))


async def test_a_look_shows_the_state_and_the_cpu_time_of_a_process():
    with subprocess.Popen(["sleep", "60"]) as child:
        os.kill(child.pid, signal.SIGSTOP)
        await wait_until(lambda: look_at(child.pid).state == "T", what="it is stopped")
        child.kill()
    assert look_at(os.getpid()).cpu_ticks > 0


async def test_a_look_shows_input_that_nobody_reads():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0] as served:
            assert not look_at(os.getpid(), port).has_work
            client.sendall(b"work")
            await wait_until(lambda: look_at(os.getpid(), port).has_work, what="the kernel has it")
            served.recv(4)
            assert not look_at(os.getpid(), port).has_work


def test_one_whose_connections_are_closed_is_ending_whatever_ps_says_of_it():
    """A process that is killed closes them a moment before it is a zombie: seen about three times in a thousand."""
    for _ in range(300):
        ours, its = socket.socketpair()
        with subprocess.Popen(["sleep", "60"], stdin=its) as child:
            its.close()
            assert not look_at(child.pid).ending
            child.kill()
            assert ours.recv(1) == b""
            assert look_at(child.pid).ending
        ours.close()
