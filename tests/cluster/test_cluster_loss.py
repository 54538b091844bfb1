"""A part of a pool over several nodes is lost in mid-stream: seen in time, told, replaced, and nothing of it is left."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.network import processes_in
from tests.cluster.seed import ADDRESSES, HEAD, Cluster, await_true, seed_cluster
from tests.tiny_model import EOS, RECITAL

pytestmark = [
    pytest.mark.engine,
    pytest.mark.root,
    pytest.mark.usefixtures("as_root"),
    pytest.mark.timeout(240),
]

# A coordinator and two backends hold the model, so that three of the four nodes are enough.
CAP_BYTES = 176_000_000
# Each test loses a model of its own: one that keeps dying would have to wait.
MODELS = LENDER_KILLED, LENDER_FROZEN, COORDINATOR_KILLED, COORDINATOR_FROZEN, CABLE_PULLED = (
    "lender-killed",
    "lender-frozen",
    "coordinator-killed",
    "coordinator-frozen",
    "cable-pulled",
)
Fault = Callable[[dict[str, Any]], tuple[Callable[[], None], str]]
URL = f"http://{HEAD}:7460/v1/chat/completions"
ASK = """
import sys, urllib.error, urllib.request
asked = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
try:
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
for line in answer:
    print(line.decode(), end="", flush=True)
"""
LENDING, SERVING, FORWARDING = "ggml-rpc-server", "llama-server", "agent.forwarder"
GONE_BY_ITSELF_S = 25.0  # a lender that sees nobody any more: 8 s until its forwarder does, and what it waits then


@dataclass
class Stream:
    """A long answer that somebody on the head's host is reading."""

    process: "subprocess.Popen[str]"
    events: list[dict[str, Any]] = field(default_factory=list)
    ended_s: float = 0.0
    """When its error came, or its end where there was none."""

    def read(self) -> None:
        for line in self.process.stdout or ():
            data = line.removeprefix("data: ").strip()
            if data.startswith("{"):
                self.events.append(json.loads(data))
            if self.error is not None and not self.ended_s:
                self.ended_s = time.monotonic()
        self.ended_s = self.ended_s or time.monotonic()

    @property
    def error(self) -> dict[str, Any] | None:
        return self.events[-1].get("error") if self.events else None


def body(model: str, **more: Any) -> str:
    asked = {"model": model, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "cache_prompt": False}
    return json.dumps(asked | more)


@contextlib.contextmanager
def streaming(cluster: Cluster, model: str) -> Iterator[Stream]:
    """Yield a stream whose first words have arrived."""
    asked = body(model, stream=True, max_tokens=4000, logit_bias={str(EOS): -100})
    argv = cluster.hosts[HEAD].argv(sys.executable, "-c", ASK, URL, asked)
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


def answer(cluster: Cluster, model: str) -> str:
    said = cluster.hosts[HEAD].run(sys.executable, "-c", ASK, URL, body(model, max_tokens=1000))
    choices = json.loads(said.stdout).get("choices")
    assert choices, said.stdout
    return str(choices[0]["message"]["content"])


def processes(cluster: Cluster, address: str, name: str) -> list[int]:
    """The pids on a host with `name` in their command line."""
    found = []
    for pid in processes_in(cluster.hosts[address].namespace):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def pool_of(cluster: Cluster, model: str) -> dict[str, Any]:
    """The model's ready coordinator, as its node reports it."""
    for node in cluster.nodes():
        for instance in node["report"].get("instances", ()):
            if instance["model"] == model and instance["state"] == "READY":
                return dict(instance, node_id=node["report"]["node_id"])
    return {}


def pool_seen(cluster: Cluster, model: str, besides: str = "") -> dict[str, Any]:
    """The same, as soon as it is reported, which is a moment after its first token."""
    found: dict[str, Any] = {}

    def seen() -> bool:
        found.update(pool_of(cluster, model))
        return found.get("pool_id", besides) != besides

    await_true(seen, 30, lambda: f"a pool of {model} besides {besides or 'none'} is reported, not {found}")
    return found


def address_of(node_id: str) -> str:
    return f"192.168.1.{node_id.removeprefix('node-')}"


def lenders_of(pool: dict[str, Any]) -> list[str]:
    """Addresses."""
    return [address_of(share["node_id"]) for share in pool["shares"] if share.get("node_id")]


def only_this_is_left(cluster: Cluster, pool: dict[str, Any]) -> str:
    """What runs or is reserved anywhere besides this pool; empty when nothing is."""
    expected = {address: {LENDING: 1, FORWARDING: 1, SERVING: 0} for address in lenders_of(pool)}
    expected.setdefault(address_of(pool["node_id"]), {LENDING: 0, FORWARDING: 0, SERVING: 0})[SERVING] = 1
    wrong = [
        f"{len(pids)} {name} on {address}"
        for address in ADDRESSES
        for name in (LENDING, FORWARDING, SERVING)
        if len(pids := engine_pids(cluster, address, name)) != expected.get(address, {}).get(name, 0)
    ]
    for node in cluster.nodes():
        held = [each["pool_id"] for each in node["report"].get("reservations", ())]
        ours = address_of(node["report"]["node_id"]) in expected
        if node["connected"] and held != [pool["pool_id"]] * ours:
            wrong.append(f"{held} reserved on {node['report']['node_id']}")
    return "; ".join(wrong)


def engine_pids(cluster: Cluster, address: str, name: str) -> list[int]:
    """Those of `name` that are processes of their own: not the agent, which has it among its arguments."""
    agents = set(processes(cluster, address, "--node-id"))
    return [pid for pid in processes(cluster, address, name) if pid not in agents]


@pytest.fixture(scope="module")
def cluster(engine_binary: Path, reciting_model: Path) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="sollol-loss-") as home:
        models = Path(home, "models")
        models.mkdir()
        for name in MODELS:
            shutil.copy(reciting_model, models / f"{name}.gguf")
        caps = dict.fromkeys(ADDRESSES, CAP_BYTES)
        with seed_cluster(Path(home), caps=caps, model_dir=models, engine=engine_binary) as cluster:
            yield cluster


def lose(
    cluster: Cluster,
    model: str,
    fault: "Fault",
    within_s: float,
    reason: str = "ENGINE_DIED",
) -> dict[str, Any]:
    """Break a pool in mid-stream: the stream must say so in time, and who asks just then gets a whole answer.

    `fault` finds what to break, and returns how to and the words that the reason must have. Returns the pool that
    answers.
    """
    with streaming(cluster, model) as stream, ThreadPoolExecutor(1) as asking:
        pool = pool_seen(cluster, model)
        assert len(lenders_of(pool)) == 2, pool
        strike, words = fault(pool)
        began_s = time.monotonic()
        strike()
        replayed = asking.submit(answer, cluster, model)
        await_true(lambda: stream.ended_s, within_s + 10, "the stream ends")
    took_s = stream.ended_s - began_s
    print(f"{model}: told after {took_s:.2f} s: {stream.error}")
    assert stream.error is not None, stream.events[-1:]
    assert stream.error["code"] == reason
    assert stream.error["retry"] == "RETRYABLE"
    assert words in stream.error["message"]
    others = [f"node-{address.rpartition('.')[2]}" for address in lenders_of(pool)]
    assert [name for name in others if name in stream.error["message"] and name not in words] == []
    assert words in cluster.log_of("head")
    assert took_s < within_s
    assert replayed.result() == RECITAL
    print(f"{model}: answered again {time.monotonic() - stream.ended_s:.2f} s after that")
    return pool_seen(cluster, model, besides=pool["pool_id"])


def ended_well(cluster: Cluster, model: str, pool: dict[str, Any], within_s: float = 5.0) -> None:
    began_s = time.monotonic()
    left = ["?"]

    def nothing_else() -> bool:
        left[:] = [only_this_is_left(cluster, pool)]
        return not left[0]

    try:
        await_true(nothing_else, within_s, "nothing else is left")
    except AssertionError as error:
        raise AssertionError(f"{error}: {left}") from None
    print(f"{model}: nothing else left {time.monotonic() - began_s:.2f} s later")
    assert cluster.sollol("unload", model).returncode == 0


def signal_lender(cluster: Cluster, number: int, what: str) -> Fault:
    def found(pool: dict[str, Any]) -> tuple[Callable[[], None], str]:
        address = lenders_of(pool)[-1]
        (pid,) = engine_pids(cluster, address, LENDING)
        return lambda: os.kill(pid, number), f"the backend on node-{address.rpartition('.')[2]} {what}"

    return found


def signal_coordinator(number: int) -> Fault:
    def found(pool: dict[str, Any]) -> tuple[Callable[[], None], str]:
        words = "ended while it was serving (SIGKILL)" if number == signal.SIGKILL else "stopped by a signal"
        return lambda: os.kill(pool["pid"], number), words

    return found


def test_a_killed_backend_is_told_within_a_second_and_replaced(cluster: Cluster) -> None:
    pool = lose(cluster, LENDER_KILLED, signal_lender(cluster, signal.SIGKILL, "ended (SIGKILL)"), within_s=1)

    ended_well(cluster, LENDER_KILLED, pool)


def test_a_frozen_backend_is_told_within_five_seconds_and_replaced(cluster: Cluster) -> None:
    pool = lose(cluster, LENDER_FROZEN, signal_lender(cluster, signal.SIGSTOP, "was stopped"), within_s=5)

    ended_well(cluster, LENDER_FROZEN, pool)


def test_a_killed_coordinator_is_told_within_a_second_and_replaced(cluster: Cluster) -> None:
    pool = lose(cluster, COORDINATOR_KILLED, signal_coordinator(signal.SIGKILL), within_s=1)

    ended_well(cluster, COORDINATOR_KILLED, pool)


def test_a_frozen_coordinator_is_told_within_five_seconds_and_replaced(cluster: Cluster) -> None:
    stop = signal_coordinator(signal.SIGSTOP)
    pool = lose(cluster, COORDINATOR_FROZEN, stop, within_s=5, reason="ENGINE_STALLED")

    ended_well(cluster, COORDINATOR_FROZEN, pool)


def test_a_lender_whose_cable_is_pulled_is_told_within_ten_seconds_and_replaced(cluster: Cluster) -> None:
    pulled = []

    def pull(pool: dict[str, Any]) -> tuple[Callable[[], None], str]:
        pulled.extend(address for address in lenders_of(pool) if address != HEAD)
        return cluster.hosts[pulled[0]].link_down, f"node-{pulled[0].rpartition('.')[2]} is lost"

    try:
        pool = lose(cluster, CABLE_PULLED, pull, within_s=10)
        assert pulled[0] not in lenders_of(pool)
        ended_well(cluster, CABLE_PULLED, pool, GONE_BY_ITSELF_S)
    finally:
        for address in pulled[:1]:
            cluster.hosts[address].link_up()
