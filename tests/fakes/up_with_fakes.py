"""`sollol up` over stand-ins for both daemons: run as `python -m tests.fakes.up_with_fakes up ...`.

The same module plays the daemons. `$FAKE_DIES` ends the agent of that name, `$FAKE_DEAF` makes it ignore SIGTERM.
"""

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


def daemon() -> None:
    name = flag("--node-id") or "head"
    url = os.environ.get(f"SOLLOL_{'HEAD' if name == 'head' else 'AGENT'}_MQTT_URL")
    mqtt = {"mqtt": url} if url else {}
    for level, event in (("info", "started"), ("error", "complained")):
        print(
            json.dumps({"level": level, "event": event, "caps": flag("--caps"), **mqtt}),
            file=sys.stderr,
            flush=True,
        )
    if os.environ.get("FAKE_DIES") == name:
        sys.exit("Traceback: boom")
    if os.environ.get("FAKE_DEAF") == name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: ended(name))
    Path(f"{os.environ['FAKE_ENDS']}.{name}.up").touch()  # from here a signal is answered
    if name == "head":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", int(flag("--http-port"))), Ready)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while sys.stdin.buffer.read(1):  # until `up` is gone
        pass
    ended(name)


def ended(name: str) -> None:
    with Path(os.environ["FAKE_ENDS"]).open("a") as ends:
        ends.write(name + "\n")
    os._exit(0)


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        pass


if __name__ == "__main__":
    if sys.argv[1] != "up":
        daemon()
    else:
        from sollold.cli import up
        from sollold.cli.arguments import run

        async def all_seen(self: "up._Up") -> bool:
            marks = (Path(f"{os.environ['FAKE_ENDS']}.node-{at + 1}.up") for at in range(self._options.agents))
            return all(mark.exists() for mark in marks)

        up.HEAD_MODULE = up.AGENT_MODULE = "tests.fakes.up_with_fakes"
        up.AGENT_STOP_S = 3
        up._Up._all_nodes_seen = all_seen
        sys.exit(run(sys.argv[1:]))
