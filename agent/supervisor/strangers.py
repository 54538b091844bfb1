"""Who speaks to a backend past its forwarder: whoever has an account on this machine reaches its port on loopback.

The engine answers them all. Nothing keeps them out, but they can be seen, since the kernel tells whose a connection is.
"""

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from agent.supervisor.ports import LOOPBACK

_ROOT = 0  # may do all, and owns what has just been closed


def stranger_at(pid: int, port: int) -> int | None:
    """The number of another user who is connected to `port` on loopback, where the process listens; None: nobody is."""
    found: list[str] = []
    for table in ("tcp", "tcp6"):  # the latter has those who write the address in the long way
        try:
            found += Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue  # it is gone, or this machine has no IPv6
    return other_user(found, port, us=os.geteuid())


def other_user(lines: Iterable[str], port: int, *, us: int) -> int | None:
    """The same of the kernel's table of connections."""
    loopback = _word(socket.inet_aton(LOOPBACK))
    remotes = {f"{prefix}{loopback}:{port:04X}" for prefix in ("", f"{'0' * 16}{_word(bytes((0, 0, 255, 255)))}")}
    for line in lines:
        _, _, remote, _, _, _, _, user = line.split(maxsplit=8)[:8]
        if remote in remotes and int(user) not in (us, _ROOT):
            return int(user)
    return None


def _word(four: bytes) -> str:
    return f"{int.from_bytes(four, sys.byteorder):08X}"
