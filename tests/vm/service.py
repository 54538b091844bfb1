"""Head and agent as services of one machine, as its README says, on loopback; asked from out here, where Python is fast."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.cluster.seed import await_true
from tests.nspawn.service import ASK, ENGINES, MODELS
from tests.vm.machine import HOST, VirtualMachine

WAIT_S = 120.0
SERVED = HTTP, GRPC = 7460, 7461
AGENT = f'node_id = "vm"\nmodel_dirs = ["{MODELS}"]\nthreads = 1\nredis_url = "redis://127.0.0.1:6379/0"\n'
HEAD = 'redis_url = "redis://127.0.0.1:6379/0"\n'
TREE = "/sys/fs/cgroup/system.slice/sollol-agent.service"
USER, UID = "ann", 1000
USER_TREE = f"/sys/fs/cgroup/user.slice/user-{UID}.slice/user@{UID}.service/app.slice/sollol-agent.service"


def on_each_machine(test: Callable[["Node"], None]) -> Callable[[dict[str, "Node"]], None]:
    """A test of one node, made one of all `nodes` at the same time: each leaves a core idle most of the time."""

    def on_all(nodes: dict[str, Node]) -> None:
        with ThreadPoolExecutor(len(nodes)) as pool:
            tried = {name: pool.submit(test, node) for name, node in nodes.items()}
        for name, future in tried.items():
            if (error := future.exception()) is not None:
                error.add_note(f"on {name}")
                raise error

    on_all.__name__, on_all.__doc__ = test.__name__, test.__doc__
    return on_all


class Node:
    """The services of `machine`."""

    def __init__(self, machine: VirtualMachine) -> None:
        self.machine = machine
        self._ours = {its: ours for ours, its in machine.forwards.items()}

    def install(self) -> None:
        machine = self.machine
        machine.must("systemctl", "start", "redis-server", timeout_s=WAIT_S)
        machine.must("sollol", "systemd", "install", "--head", "--agent", timeout_s=WAIT_S)
        machine.write("/etc/sollol/agent.toml", AGENT)
        machine.write("/etc/sollol/head.toml", HEAD)
        machine.must("systemctl", "enable", "--now", "sollold", "sollol-agent", timeout_s=WAIT_S)
        await_true(self.report, WAIT_S, "the head sees the node")

    def install_for_a_user(self) -> None:
        """The agent, with the engine that the system's has, and instead of it."""
        self.machine.must("systemctl", "stop", "sollol-agent", "sollol-engines", timeout_s=WAIT_S)
        self.machine.must("useradd", "--create-home", "--uid", str(UID), USER)
        self.machine.must("systemctl", "start", f"user@{UID}", timeout_s=WAIT_S)
        self.as_user("sollol", "systemd", "install", "--user", "--agent")
        (engine,) = self.machine.must("sh", "-c", f"echo {ENGINES}/*/bin/llama-server").split()
        settings = f"/home/{USER}/.config/sollol/agent.toml"
        self.machine.must("tee", settings, stdin=AGENT.replace('"vm"', f'"{USER}"') + f'engine = "{engine}"\n')
        self.as_user("systemctl", "--user", "enable", "--now", "sollol-agent")
        await_true(lambda: self.report().get("node_id") == USER, WAIT_S, "the head sees the user's node")

    def as_user(self, *command: str) -> str:
        session = (f"XDG_RUNTIME_DIR=/run/user/{UID}", f"HOME=/home/{USER}")
        return self.machine.must("runuser", "--user", USER, "--", "env", *session, *command, timeout_s=WAIT_S)

    def sollol(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Our own command, for its head."""
        command = (sys.executable, "-m", "sollold.cli", "--head", f"{HOST}:{self._ours[GRPC]}", *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    def report(self) -> dict[str, Any]:
        """Its newest; empty while the head is not connected to it."""
        done = self.sollol("nodes", "--json")
        nodes = json.loads(done.stdout)["nodes"] if done.returncode == 0 else []
        return next((dict(node["report"]) for node in nodes if node.get("connected")), {})

    def instance(self) -> dict[str, Any]:
        """The coordinator that is ready; empty when none is."""
        ready = (each for each in self.report().get("instances", ()) if each["state"] == "READY")
        return next(ready, {})

    def load(self, model: str) -> dict[str, Any]:
        done = self.sollol("load", model)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.machine.journal('sollold', 'sollol-agent')}"
        await_true(self.instance, WAIT_S, f"{model} is ready")
        return self.instance()

    def engine(self, model: str) -> dict[str, Any]:
        """The instance that serves the model, which is loaded if none does."""
        return self.instance() or self.load(model)

    def failure(self, instance_id: str) -> dict[str, Any]:
        """Why that instance has ended; empty while it has not."""
        ended = (each for each in self.report().get("instances", ()) if each["instance_id"] == instance_id)
        return dict(next((each["refusal"] for each in ended if each["refusal"]), {}))

    def answer(self, model: str) -> str:
        """The first word that the head answers over HTTP."""
        asked = {"model": model, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 1}
        url = f"http://{HOST}:{self._ours[HTTP]}/v1/chat/completions"
        command = (sys.executable, "-c", ASK, url, json.dumps(asked), "")
        said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
        choices = json.loads(said.stdout or "{}").get("choices")
        assert choices, said
        assert choices[0]["message"]["content"], said
        return str(choices[0]["message"]["content"])

    def cgroup_of(self, pid: int) -> str:
        return self.machine.must("cat", f"/proc/{pid}/cgroup").strip().removeprefix("0::")

    def held(self, cgroup: str, name: str, tree: str = TREE) -> str:
        """What is in one file of a cgroup of the agent's unit."""
        return self.machine.must("cat", f"{tree}/{cgroup}/{name}").strip()
