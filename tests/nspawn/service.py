"""SOLLOL on booted machines, as its README says: the wheel, `sollol systemd install`, settings, `systemctl enable --now`."""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.network import processes_in
from tests.cluster.seed import await_true
from tests.nspawn.machines import Machine, command_of
from tests.nspawn.root import VENV, pip

HEAD, LARGE, SMALL = ADDRESSES = ("192.168.1.10", "192.168.1.20", "192.168.1.21")
MODELS = "/srv/models"
ENGINES = "/var/cache/sollol/engine"
CAP_BYTES = 176_000_000  # so that the model needs all three nodes: a coordinator and two backends
SEEN_WITHIN_S = 30.0
URL = f"http://{HEAD}:7460/v1/chat/completions"
REDIS = f'bind {HEAD}\nprotected-mode no\nsave ""\nsupervised systemd\n'
# A short watchdog, on one machine: the shipped one takes half a minute.
WATCHDOG = "[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n"
ASK = """
import sys, urllib.error, urllib.request
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[3]}
asked = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), headers)
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
for line in answer:
    print(line.decode(), end="", flush=True)
"""


def prepare(root: Path, wheel: Path, *, engine: Path, models: Mapping[str, Path]) -> None:
    """Put the wheel, the engine and models into the file system that all machines boot from."""
    shutil.copy(wheel, root / wheel.name)
    pip(f"{VENV}/bin/python", "install", "--no-index", "--no-deps", f"/{wheel.name}", root=root)
    built = engine.parents[1]
    shutil.copytree(built, root / ENGINES.lstrip("/") / built.name)
    (root / MODELS.lstrip("/")).mkdir(parents=True)
    for name, path in models.items():
        shutil.copy(path, root / MODELS.lstrip("/") / f"{name}.gguf")


@dataclass
class Stream:
    """A long answer that somebody on the head's machine is reading."""

    process: "subprocess.Popen[str]"
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False

    def read(self) -> None:
        for line in self.process.stdout or ():
            data = line.removeprefix("data: ").strip()
            self.done = self.done or data == "[DONE]"
            if data.startswith("{"):
                self.events.append(json.loads(data))

    @property
    def error(self) -> dict[str, Any] | None:
        return next((event["error"] for event in self.events if "error" in event), None)


class Services:
    """The daemons of one cluster, as services of its machines."""

    def __init__(self, machines: Mapping[str, Machine]) -> None:
        self.machines = machines
        self.head = machines[HEAD]
        self.key = ""

    def install(self) -> None:
        self.head.write("/etc/redis/redis.conf", REDIS)
        self.head.must("systemctl", "start", "redis-server")
        self.head.must("sollol", "pki", "init", "--cluster", "home", "--head-id", "head")
        for address, machine in self.machines.items():
            if address == HEAD:
                machine.must("sollol", "pki", "issue", "agent", node_id(HEAD), "--out", "/etc/sollol/pki/agent")
                machine.must("sollol", "systemd", "install", "--head", "--agent")
                machine.write("/etc/sollol/head.toml", self.head_settings())
                self.key = machine.must("sollol", "keys", "add", "test").strip()
            else:
                self._join(machine)
                machine.must("sollol", "systemd", "install", "--agent")
            machine.write("/etc/sollol/agent.toml", self.agent_settings(address))
            if address == SMALL:
                machine.write("/etc/systemd/system/sollol-agent.service.d/watchdog.conf", WATCHDOG)
                machine.must("systemctl", "daemon-reload")
            units = ("sollold", "sollol-agent") if address == HEAD else ("sollol-agent",)
            machine.must("systemctl", "enable", "--now", *units, timeout_s=90)
        await_true(lambda: len(self.nodes()) == len(self.machines), SEEN_WITHIN_S, "the head sees every node")

    def _join(self, machine: Machine) -> None:
        """One command on each side."""
        words = ("sollol", "pki", "invite", "--node", node_id(machine.address), "--address", HEAD)
        with subprocess.Popen(self.head.argv(*words), stdout=subprocess.PIPE, text=True) as inviting:
            assert inviting.stdout is not None
            line = inviting.stdout.readline().split()
            assert line[:2] == ["sollol", "join"], line
            machine.must(*line)
            assert inviting.wait(20) == 0

    def agent_settings(self, address: str, **more: Any) -> str:
        models = f'["{MODELS}"]' if address == LARGE else "[]"
        return (
            f'node_id = "{node_id(address)}"\nhost = "{address}"\nlisten = "{address}"\n'
            f'redis_url = "redis://{HEAD}:6379/0"\nmodel_dirs = {models}\nthreads = 1\ncaps = {{ CPU = {CAP_BYTES} }}\n'
        ) + "".join(f"{name} = {json.dumps(setting)}\n" for name, setting in more.items())

    def head_settings(self, **more: Any) -> str:
        return (f'listen = "{HEAD}"\nhost = "{HEAD}"\nredis_url = "redis://{HEAD}:6379/0"\n') + "".join(
            f"{name} = {json.dumps(setting)}\n" for name, setting in more.items()
        )

    def sollol(self, *words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return self.head.run("sollol", "--head", f"{HEAD}:7461", *words, timeout_s=timeout_s)

    def nodes(self) -> list[dict[str, Any]]:
        """The newest reports of the nodes that the head is connected to."""
        done = self.sollol("nodes", "--json")
        nodes = json.loads(done.stdout)["nodes"] if done.returncode == 0 else []
        return [node["report"] for node in nodes if node.get("connected")]

    def load(self, model: str) -> None:
        done = self.sollol("load", model)
        assert done.returncode == 0, (
            done.stdout
            + done.stderr
            + "".join(machine.journal("sollold", "sollol-agent") for machine in self.machines.values())
        )

    def instances(self, model: str) -> dict[str, dict[str, Any]]:
        """What runs for the model, by the address of its node."""
        return {
            node["host"]: instance
            for node in self.nodes()
            for instance in node.get("instances", ())
            if instance["instance_id"].startswith(f"{model}-")
        }

    def parts(self, machine: Machine) -> dict[int, str]:
        """Engines, forwarders and tunnels that run there: pid out here, and program."""
        found = {pid: command_of(pid) for pid in processes_in(machine.host.namespace)}
        names = ("llama-server", "ggml-rpc-server", "agent.forwarder", "agent.tunnel")
        return {
            pid: name
            for pid, command in found.items()
            for name in names
            if name in command and "nsenter" not in command
        }

    def answer(self, model: str) -> str:
        said = self.head.host.run(sys.executable, "-c", ASK, URL, _body(model, max_tokens=1000), self.key)
        choices = json.loads(said.stdout).get("choices")
        assert choices, said.stdout
        return str(choices[0]["message"]["content"])

    @contextlib.contextmanager
    def streaming(self, model: str, **more: Any) -> Iterator[Stream]:
        """Yield a stream whose first words have arrived."""
        asked = _body(model, stream=True, max_tokens=4000, **more)
        argv = self.head.host.argv(sys.executable, "-c", ASK, URL, asked, self.key)
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            stream = Stream(process)
            reader = threading.Thread(target=stream.read)
            reader.start()
            try:
                await_true(lambda: len(stream.events) > 5, 30, lambda: f"{model} speaks: {stream.events}")
                yield stream
            finally:
                process.kill()
                reader.join()


def node_id(address: str) -> str:
    return f"node-{address.rsplit('.', 1)[1]}"


def _body(model: str, **more: Any) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "cache_prompt": False}
    return json.dumps(asked | more)
