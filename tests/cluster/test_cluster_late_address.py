"""Daemons that are there before their network is, as services are after power-on."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.network import network
from tests.cluster.seed import await_true

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("as_root")]

HERE, LATER = "192.168.1.10", "192.168.1.11"


@pytest.mark.parametrize("program", ["agent", "sollold"])
def test_a_daemon_whose_address_comes_later_serves_there_then(program: str, tmp_path: Path):
    log = tmp_path / "output"
    folders = ("state", "log", "run") if program == "agent" else ("state",)
    flags = [word for name in folders for word in (f"--{name}-dir", str(tmp_path / name))]
    flags += ["--tls-dir", "", "--redis-url", "", "--listen", LATER, "--host", LATER, "--insecure"]
    with network((HERE,)) as (host,):
        process = host.spawn(sys.executable, "-m", program, "--log-format", "json", *flags, log=log, environ={})
        try:
            await_true(lambda: "address_awaited" in log.read_text(), 30, log.read_text)

            added = ("ip", "-n", host.namespace, "address", "add", f"{LATER}/24", "dev", "eth0")
            subprocess.run(added, check=True, capture_output=True)

            await_true(lambda: "_ready" in log.read_text(), 30, log.read_text)
        finally:
            process.terminate()
            assert process.wait(20) == 0, log.read_text()
