"""What a daemon tells systemd about itself, sd_notify(3): ready, reloading, stopping, what it does, still alive."""

import socket
import time
from collections.abc import Mapping

import structlog

log = structlog.get_logger(__name__)

_US_PER_S = 1_000_000


class Notices:
    """Nothing is sent without a `notify_socket`, and nothing is lost for the daemon when nobody listens there.

    Args:
        notify_socket: `$NOTIFY_SOCKET`.
        watchdog_s: How long the daemon may be silent before systemd ends it; 0: as long as it likes.
    """

    def __init__(self, notify_socket: str = "", watchdog_s: float = 0.0) -> None:
        self._notify_socket = notify_socket
        self.watchdog_s = watchdog_s
        self._status = ""
        self._deaf = False

    @classmethod
    def to_systemd(cls, environ: Mapping[str, str], pid: int) -> "Notices":
        """As the environment says, and for the process that it says it to: `pid` is the caller's."""
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        meant = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        watchdog_s = int(watchdog_us) / _US_PER_S if meant and watchdog_us.isdecimal() else 0.0
        return cls(environ.get("NOTIFY_SOCKET", ""), watchdog_s)

    def ready(self) -> None:
        self._send("READY=1")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def reloading(self) -> None:
        """`ready` says that it is done."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`; the same one again is not sent."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def extend(self, within_s: float) -> None:
        """Ask for so much more time, from now on, for what is being done (starting, stopping)."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(within_s * _US_PER_S)}")

    def alive(self) -> None:
        """Feed the watchdog, if there is one."""
        if self.watchdog_s:
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._notify_socket:
            return
        try:
            sd_notify(state, self._notify_socket)
        except OSError as error:
            if not self._deaf:
                log.warning("systemd_not_reached", socket=self._notify_socket, problem=str(error))
            self._deaf = True
        else:
            self._deaf = False


def sd_notify(state: str, notify_socket: str) -> None:
    """Send one notice. Raises OSError when nobody listens."""
    address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)  # a systemd that does not read must not hold up the event loop
        sender.connect(address)
        sender.sendall(state.encode())
