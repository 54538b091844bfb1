"""A model that needs all four nodes, and something wrong with one of them: a typed refusal, and nothing is left."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.ask import TOKENS, Answer, Question
from tests.cluster.journal import Change, journal_of, promised
from tests.cluster.launchers import BACKEND, COORDINATOR, Launchers
from tests.cluster.network import processes_in
from tests.cluster.seed import ADDRESSES, HEAD, LARGE, UP_WITHIN_S, Cluster, await_true, seed_cluster
from tests.gguf_bytes import gguf
from tests.tiny_model import PIECES

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root"), pytest.mark.timeout(180)]

# With this KV cache a coordinator without layers takes 169 MB, and a lender 171 MB and 17 MB for each of 8 layers.
TTL_S = 3
HEAD_FLAGS = ("--context-per-slot", "8192", "--parallel", "8", "--reservation-ttl-s", str(TTL_S))
CAP = 230_000_000
SHORT_OF_A_LAYER = 171_000_000
LENDER, LAST = "192.168.1.21", "192.168.1.22"
MODEL = "recital"
OCCUPY = """
import signal, socket
taken = []
for port in range(7500, 7700):
    taken.append(socket.socket())
    taken[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    taken[-1].bind(("0.0.0.0", port))
    taken[-1].listen()
print("taken", flush=True)
signal.pause()
"""


@dataclass
class Site:
    """The cluster with launchers in front of its engines; `odd` are the hosts that the next test wants as usual."""

    cluster: Cluster
    launchers: dict[str, Launchers]
    users: ThreadPoolExecutor
    odd: set[str] = field(default_factory=set)

    def start(self, address: str, *, cap: int = CAP) -> None:
        models = (str(self.cluster.directory / "models"),) if address == LARGE else ()
        engine = self.launchers[address].engine
        flags = ("--log-level", "debug")
        self.cluster.start_agent(address, caps={"CPU": cap}, model_dirs=models, engine=engine, more=flags)

    def end(self, address: str, with_signal: signal.Signals) -> None:
        self.odd.add(address)
        self.cluster.daemons[address].send_signal(with_signal)
        self.cluster.daemons[address].wait(20)

    def restart(self, address: str, *, cap: int = CAP) -> None:
        """With whatever its launchers have become; returns when the head hears from it again."""
        before = self.times_connected(address)
        if self.cluster.daemons[address].poll() is None:
            self.end(address, signal.SIGTERM)
        self.start(address, cap=cap)
        await_true(lambda: self.times_connected(address) > before, UP_WITHIN_S, f"the head hears from {address}")

    def times_connected(self, address: str) -> int:
        node_id = f"node-{address.rsplit('.', 1)[1]}"
        return self.cluster.log_of("head").count(f'"node_connected","node":"{node_id}"')

    def engine_of(self, address: str) -> dict[str, str]:
        (engine,) = (node["report"]["engine"] for node in self.cluster.nodes() if node["report"]["host"] == address)
        return engine

    def as_usual(self) -> None:
        for address in sorted(self.odd):
            self.launchers[address].be_yourself()
            self.restart(address)
        self.odd.clear()

    def begin(self, model: str = MODEL) -> "Future[list[Answer]]":
        return self.users.submit(self.cluster.ask, [Question(f"{HEAD}:7461", model)])

    def ask(self, model: str = MODEL) -> Answer:
        (answer,) = self.begin(model).result(60)
        return answer

    def journal(self) -> list[Change]:
        return journal_of({address: self.cluster.log_of(address) for address in ADDRESSES})

    def programs(self, address: str) -> str:
        lines = []
        for pid in processes_in(self.cluster.hosts[address].namespace):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " "))
        return "\n".join(lines)

    def nothing_left(self) -> None:
        """Neither in the journals, nor as the head sees it, nor as a process."""
        await_true(lambda: [*promised(self.journal())][-1:] in ([], [{}]), TTL_S + 20, "the journals end with nothing")
        self.cluster.nothing_left()


@pytest.fixture(autouse=True)
def no_process_left() -> None:
    """The daemons that a test starts again are the cluster's, and end with it; `nothing_left` looks for engines."""


@pytest.fixture(scope="module")
def made(as_root: None, reciting_model: Path, engine_binary: Path) -> Iterator[Site]:
    directory = Path(tempfile.mkdtemp(prefix="sc"))  # a short path: sockets have at most 107 bytes
    models = directory / "models"
    models.mkdir()
    os.link(reciting_model, models / f"{MODEL}.gguf")
    models.joinpath("hollow.gguf").write_bytes(gguf({"general.architecture": "llama", "llama.block_count": 0}))
    launchers = {address: Launchers(directory / f"engine-{address}", engine_binary) for address in ADDRESSES}
    with (
        seed_cluster(directory, caps={}, model_dir=models, engine=engine_binary, head_flags=HEAD_FLAGS) as cluster,
        ThreadPoolExecutor(2) as users,
    ):
        site = Site(cluster, launchers, users)
        for address in ADDRESSES:
            site.start(address)
        cluster.seen(ADDRESSES)
        yield site
    shutil.rmtree(directory)


@pytest.fixture
def site(made: Site) -> Site:
    made.as_usual()
    return made


def refused(answer: Answer, reason: str) -> Answer:
    assert answer.reason == reason, answer
    assert not answer.text
    return answer


def other_build(site: Site) -> None:
    site.launchers[LAST].be_another_build()
    site.restart(LAST)
    assert site.engine_of(LAST)["build"].startswith("9.9.9")


def other_protocol(site: Site) -> None:
    site.launchers[LAST].speak_another_protocol()
    site.restart(LAST)
    assert site.engine_of(LAST)["rpc_protocol"] == "8.0"


def no_room_for_a_layer(site: Site) -> None:
    site.launchers[LAST].be_yourself()
    site.restart(LAST, cap=SHORT_OF_A_LAYER)


@pytest.mark.parametrize("spoil", [other_build, other_protocol, no_room_for_a_layer])
def test_a_node_that_cannot_take_part_is_not_asked_and_the_refusal_has_the_numbers(made, spoil):
    site = made  # odd as the last case may have left it: starting an agent again takes seconds
    spoil(site)
    before = len(site.journal())

    answer = refused(site.ask(), "NO_FIT")

    assert answer.numbers["nodes"] == len(ADDRESSES)
    assert answer.numbers["needed_bytes"] > CAP
    assert not [change for change in site.journal()[before:] if change.what == "reserved"]
    site.nothing_left()


def test_a_model_without_layers_is_refused_for_what_it_is(site):
    refused(site.ask("hollow"), "MODEL_CORRUPT")
    site.nothing_left()


def test_a_node_without_a_free_backend_port_refuses_and_the_others_let_go(site):
    log = site.cluster.directory / "occupied.log"
    occupant = site.cluster.hosts[LENDER].spawn(sys.executable, "-c", OCCUPY, log=log, environ={})
    try:
        await_true(lambda: "taken" in log.read_text(), 20, "every port is taken")

        answer = refused(site.ask(), "PORT_TAKEN")
    finally:
        occupant.kill()
        occupant.wait()

    assert "7500 to 7699" in answer.message
    site.nothing_left()


def test_reservations_of_a_head_that_is_killed_lapse_within_their_time(site):
    cluster, before = site.cluster, len(site.journal())
    cluster.daemons[LAST].send_signal(signal.SIGSTOP)  # the head waits for its answer, with the others' in hand
    user = site.begin()
    try:
        await_true(lambda: reserved_on(site.journal()[before:]) == set(ADDRESSES) - {LAST}, 30, "three have reserved")

        cluster.daemons["head"].kill()
        cluster.daemons["head"].wait()
    finally:
        cluster.daemons[LAST].send_signal(signal.SIGCONT)

    assert user.result(60)[0].reason == "AGENT_UNREACHABLE"
    await_true(lambda: [*promised(site.journal())][-1] == {}, TTL_S + 10, "every reservation has lapsed")
    changes = site.journal()[before:]
    assert not [change for change in changes if change.what == "bound"]
    seen = {address: site.times_connected(address) for address in ADDRESSES}
    cluster.start_head(*HEAD_FLAGS)
    await_true(
        lambda: all(site.times_connected(address) > seen[address] for address in ADDRESSES),
        UP_WITHIN_S,
        "the head is back",
    )
    before = len(site.journal())
    assert site.ask().text == "".join(PIECES[:TOKENS])
    assert len(reserved_on(site.journal()[before:])) == len(ADDRESSES)
    assert cluster.sollol("unload", MODEL).returncode == 0
    site.nothing_left()


def reserved_on(changes: list[Change]) -> set[str]:
    return {change.host for change in changes if change.what == "reserved"}


@pytest.mark.parametrize(("address", "program"), [(LENDER, BACKEND), (LARGE, COORDINATOR)], ids=["lender", "its own"])
def test_a_node_that_vanishes_while_its_part_starts_is_told_and_the_others_let_go(site, address, program):
    launchers = site.launchers[address]
    launchers.hold(program)
    try:
        user = site.begin()
        await_true(lambda: f"{program} " in starts(site, address), 30, f"{program} is being started on {address}")

        site.end(address, signal.SIGKILL)
        refused(user.result(60)[0], "AGENT_UNREACHABLE")
    finally:
        launchers.let_go(program)

    others = set(ADDRESSES) - {address}
    await_true(lambda: not others & set(site.cluster.engines()), 30, "the other nodes' engines have ended")
    site.restart(address)  # ends what its predecessor has left
    site.odd.discard(address)
    site.nothing_left()


def starts(site: Site, address: str) -> str:
    """Command lines of held starts on this host."""
    launchers = str(site.launchers[address].directory)
    return "\n".join(line for line in site.programs(address).splitlines() if line.startswith(f"/bin/sh {launchers}"))
