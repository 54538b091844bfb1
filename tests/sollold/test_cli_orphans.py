"""`sollol up` ends what a killed daemon leaves behind, and nothing else."""

import subprocess
import sys

PROGRAM = """
import subprocess, sys
from sollold.cli.orphans import adopt_orphans, end_orphans
adopt_orphans()
subprocess.run(["sh", "-c", sys.argv[1]], stdin=subprocess.DEVNULL, check=True)
print(end_orphans())
"""


def run(shell: str) -> str:
    ran = subprocess.run([sys.executable, "-c", PROGRAM, shell], capture_output=True, text=True, timeout=20, check=True)
    return ran.stdout


def test_a_process_in_a_session_of_its_own_is_ended_when_its_parent_has_died() -> None:
    pid, killed = run("setsid sleep 600 & echo $!").splitlines()

    assert f"(pid {pid})" in killed


def test_nothing_is_told_of_when_nothing_is_left() -> None:
    assert run("true") == "[]\n"
