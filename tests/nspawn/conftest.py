"""Three booted machines for the tests on services. Where no machine can be booted the tests say so, and are skipped."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nspawn.machines import booted, overlay
from tests.nspawn.root import machine_root, wheel
from tests.nspawn.service import ADDRESSES, Services, prepare

TOOLS = ("systemd-nspawn", "debootstrap", "nsenter", "ip")


@pytest.fixture(scope="session")
def can_boot() -> None:
    """Only root can boot a machine. A missing tool is a failure: `tests/setup.sh full` installs it."""
    if os.geteuid() != 0:
        pytest.skip("booting machines with systemd-nspawn needs root")
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}; `tests/setup.sh full` installs what the tests need")


@pytest.fixture(scope="module")
def services(can_boot: None, engine_binary: Path, reciting_model: Path) -> Iterator[Services]:
    with tempfile.TemporaryDirectory(prefix="sollol-nspawn-") as directory:
        base = Path(directory)
        with overlay(machine_root(), base) as root:
            prepare(root, wheel(base / "wheel"), engine=engine_binary, models={"tiny-reciter": reciting_model})
            with booted(root, ADDRESSES, base) as machines:
                running = Services(machines)
                running.install()
                yield running
