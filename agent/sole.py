"""One agent, or none, per state directory: two would supervise, and end, each other's engines."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sollol.errors import Reason, refuse


@contextmanager
def sole_owner(state: Path) -> Iterator[None]:
    """Hold the directory until the block is left.

    Raises:
        SollolError: PORT_TAKEN; another agent holds it.
    """
    descriptor = os.open(state / "agent.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise refuse(
                Reason.PORT_TAKEN,
                f"another agent uses {state}: stop it, or give this one its own --state-dir, --log-dir and --run-dir",
            ) from error
        yield
    finally:
        os.close(descriptor)
