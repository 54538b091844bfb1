"""What can be done with any machine that is up, container or virtual: commands in it, as root."""

import abc
import shlex
import subprocess
from pathlib import Path

CLEAN = ("env", "-i", "PATH=/opt/sollol/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8")
UP = ("running", "degraded")


class Booted(abc.ABC):
    """One machine."""

    @property
    @abc.abstractmethod
    def address(self) -> str: ...

    @abc.abstractmethod
    def argv(self, *command: str) -> tuple[str, ...]:
        """`command` as it has to be started to run in there, as root and with nothing of our environment."""

    def run(self, *command: str, timeout_s: float = 60.0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*command), input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def must(self, *command: str, timeout_s: float = 60.0, stdin: str = "") -> str:
        """What `command` prints; a failure says what it and the journal say."""
        done = self.run(*command, timeout_s=timeout_s, stdin=stdin)
        if done.returncode:
            raise AssertionError(
                f"{self.address}$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n{self.journal(lines=40)}"
            )
        return done.stdout

    def journal(self, *units: str, lines: int = 200) -> str:
        words = [word for unit in units for word in ("--unit", unit)]
        return self.run("journalctl", "--no-pager", "--output=cat", f"--lines={lines}", *words).stdout

    def write(self, path: str, text: str) -> None:
        self.must("sh", "-c", f"mkdir -p {shlex.quote(str(Path(path).parent))}; cat >{shlex.quote(path)}", stdin=text)

    def shows(self, unit: str, prop: str) -> str:
        """A property of a unit, as `systemctl show` says it."""
        return self.must("systemctl", "show", "--property", prop, "--value", unit).strip()
