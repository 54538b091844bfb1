"""What `sollol up` asks of its machine: free ports, free memory, and whether its head answers."""

import asyncio
import errno
import socket
from pathlib import Path

import psutil
from sollol.errors import Reason, refuse

SHARED_PERCENT = 80  # of the free memory, over all agents
HTTP_WITHIN_S = 2.0


def check_port(host: str, port: int) -> None:
    """Raises SollolError(PORT_TAKEN) when something listens there already; it may still be taken a moment later."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {port} is taken: stop what listens there, or choose others (`sollol up --help`)"
            else:
                message = f"port {port} cannot be used: {error.strerror}; choose another (`sollol up --help`)"
            raise refuse(Reason.PORT_TAKEN, message) from error


def unequal_caps(agents: int, free_bytes: int | None = None) -> list[int | None]:
    """Bytes of RAM for each of several agents on one machine, as 1 : 2 : ... : N of 80 % of what is free.

    One agent alone gets no cap: it measures what is free.
    """
    if agents == 1:
        return [None]
    free = free_memory() if free_bytes is None else free_bytes
    shares = agents * (agents + 1) // 2
    return [free * SHARED_PERCENT * (at + 1) // (100 * shares) for at in range(agents)]


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had without swapping, within the cgroup v2 limit of a container."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except OSError:
        return available  # no cgroup v2 or the root group, which has no limit
    return available if limit == "max" else max(0, min(available, int(limit) - used))


async def http_status(host: str, port: int, path: str) -> int:
    """The status that a GET answers with; 0 when nobody answers in time."""
    try:
        async with asyncio.timeout(HTTP_WITHIN_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return 0
    words = status_line.split()
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
