"""Booted virtual machines with head and agent as services, for what the containers' shared kernel cannot show."""

import contextlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.nspawn.machines import overlay
from tests.nspawn.root import Debian, machine_root, wheel
from tests.nspawn.service import prepare
from tests.vm.machine import DEBIANS, booted
from tests.vm.service import SERVED, Node

TOOLS = ("qemu-system-x86_64", "mkfs.ext4", "ssh", "ssh-keygen", "debootstrap")


@pytest.fixture(scope="session")
def can_boot_virtual() -> None:
    """A missing tool is a failure: `tests/setup.sh full` installs it."""
    if os.geteuid() != 0:
        pytest.skip("making a virtual machine's file system needs root")
    if platform.machine() != "x86_64":
        pytest.skip(
            f"the virtual machines are x86_64, and so would have to be the engine: this is {platform.machine()}"
        )
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}; `tests/setup.sh full` installs what the tests need")


@pytest.fixture(scope="module")
def nodes(
    can_boot_virtual: None, engine_binary: Path, reciting_model: Path, ports: Callable[[], int]
) -> Iterator[dict[str, Node]]:
    """One per Debian, by name. They start side by side, since each leaves a core idle most of the time."""
    with tempfile.TemporaryDirectory(prefix="sollol-vm-") as directory, contextlib.ExitStack() as running:
        built = wheel(Path(directory) / "wheel")

        def start(debian: Debian) -> Node:
            base = Path(directory) / debian.name
            base.mkdir()
            root = running.enter_context(overlay(machine_root(debian), base))
            prepare(root, built, engine=engine_binary, models={"tiny-reciter": reciting_model})
            node = Node(running.enter_context(booted(root, base, ports, SERVED)))
            node.install()
            return node

        with ThreadPoolExecutor(len(DEBIANS)) as pool:
            started = [pool.submit(start, debian) for debian in DEBIANS]
        yield {debian.name: future.result() for debian, future in zip(DEBIANS, started, strict=True)}
