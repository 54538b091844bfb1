"""What the tests on a cluster in network namespaces need of the machine."""

import os
import shutil

import pytest

TOOLS = ("ip", "tc", "nft", "redis-server")


@pytest.fixture(scope="session")
def as_root() -> None:
    """A failure, not a skip: a cluster that was not tried proves nothing. `-m "not root"` leaves these tests out."""
    if os.geteuid() != 0:
        pytest.fail("network namespaces need root: run the tests as root, or leave these out with -m 'not root'")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.fail(f"not installed: {', '.join(missing)}; `tests/setup.sh full` installs what the tests need")
