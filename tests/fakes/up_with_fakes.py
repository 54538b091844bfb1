"""`sollol up` over stand-ins for both daemons: run as `python -m tests.fakes.up_with_fakes up ...`.

The same module plays the daemons. `$FAKE_DIES` ends the agent of that name, once `$FAKE_DIES_AFTER` runs; `$FAKE_DEAF`
makes one ignore SIGTERM, and `$FAKE_SLOW` takes a moment to end.
"""

import http.server
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


def mark(name: str) -> Path:
    """Is there once that daemon answers a signal."""
    return Path(f"{os.environ['FAKE_ENDS']}.{name}.up")


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
        while not all(mark(other).exists() for other in os.environ["FAKE_DIES_AFTER"].split()):
            time.sleep(0.01)
        sys.exit("Traceback: boom")
    if os.environ.get("FAKE_DEAF") == name:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: ended(name))
    mark(name).touch()
    if name == "head":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", int(flag("--http-port"))), Ready)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while sys.stdin.buffer.read(1):  # until `up` is gone
        pass
    ended(name)


def ended(name: str) -> None:
    if os.environ.get("FAKE_SLOW") == name:
        time.sleep(0.5)
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
            return all(mark(f"node-{at + 1}").exists() for at in range(self._options.agents))

        up.HEAD_MODULE = up.AGENT_MODULE = "tests.fakes.up_with_fakes"
        up.AGENT_STOP_S = 3
        up._Up._all_nodes_seen = all_seen
        sys.exit(run(sys.argv[1:]))
