"""An engine's two programs for one host, through scripts that can hold their starts or tell something else of them."""

import shlex
import sys
from pathlib import Path

BACKEND, COORDINATOR = "ggml-rpc-server", "llama-server"

_PLAIN = """\
#!/bin/sh
case " $* " in
    *" --version "*|*" --list-devices "*) ;;
    *) while [ -e {hold} ]; do sleep 0.05; done ;;
esac
exec {program} "$@"
"""

_OTHER_BUILD = """\
#!/bin/sh
[ "$1" = --version ] && { echo "version: 9.9.9 (build 1, commit other)" >&2; exit; }
"""

# Asked whether it works with a server on loopback, it greets it and accepts protocol 8.0 only.
_OTHER_PROTOCOL = """\
#!{python}
import os, socket, struct, sys
program, arguments = {program!r}, sys.argv[1:]
if "--rpc" not in arguments:
    os.execv(program, [program, *arguments])
host, port = arguments[arguments.index("--rpc") + 1].rsplit(":", 1)
with socket.create_connection((host, int(port)), 5) as server:
    server.sendall(struct.pack("<BQ24x", 14, 24))
    answer = server.recv(32, socket.MSG_WAITALL)
print("Available devices:")
if answer[8:10] == bytes((8, 0)):
    print(f"  RPC0: {{host}}:{{port}} (4096 MiB, 4096 MiB free)")
"""


class Launchers:
    """The scripts in `directory`; `engine` is the one to start the agent with."""

    def __init__(self, directory: Path, engine: Path) -> None:
        self.directory = directory
        self._engine = engine.resolve()
        directory.mkdir(parents=True)
        for name in (BACKEND, COORDINATOR):
            self._write(name, self._plain(name))

    @property
    def engine(self) -> str:
        return str(self.directory / COORDINATOR)

    def hold(self, name: str) -> None:
        """From now on the program's starts wait for `let_go`."""
        self._held(name).touch()

    def let_go(self, name: str) -> None:
        self._held(name).unlink(missing_ok=True)

    def be_another_build(self) -> None:
        shebang, rest = self._plain(COORDINATOR).split("\n", 1)
        assert shebang == "#!/bin/sh"
        self._write(COORDINATOR, _OTHER_BUILD + rest)

    def speak_another_protocol(self) -> None:
        self._write(COORDINATOR, _OTHER_PROTOCOL.format(python=sys.executable, program=str(self._engine)))

    def be_yourself(self) -> None:
        self._write(COORDINATOR, self._plain(COORDINATOR))

    def _held(self, name: str) -> Path:
        return self.directory / f"{name}.held"

    def _plain(self, name: str) -> str:
        program = self._engine.parent / name
        return _PLAIN.format(hold=shlex.quote(str(self._held(name))), program=shlex.quote(str(program)))

    def _write(self, name: str, text: str) -> None:
        path = self.directory / name
        path.write_text(text)
        path.chmod(0o755)
