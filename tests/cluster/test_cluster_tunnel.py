"""What a listener between two nodes sees of a model that spans them, and what who is no part of its pool can reach."""

import contextlib
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from tests.cluster.seed import ADDRESSES, HEAD, LARGE, Cluster, await_true, seed_cluster
from tests.cluster.test_cluster_loss import (
    ASK,
    CAP_BYTES,
    LENDING,
    URL,
    address_of,
    body,
    engine_pids,
    lenders_of,
    pool_seen,
    streaming,
)

pytestmark = [pytest.mark.engine, pytest.mark.root, pytest.mark.usefixtures("as_root"), pytest.mark.timeout(240)]

MODEL = "overheard"
PROMPT = "the-walls-have-ears-5f0c1a2b"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3).close()"
KNOCK = """
import socket, ssl, sys
from pathlib import Path
from sollol.tls import TlsFiles
from agent.forwarder.tls import Pool

host, port, directory, pool_id = sys.argv[1:]
context = TlsFiles(Path(directory)).client_context()
context.check_hostname = False
with socket.create_connection((host, int(port)), 5) as plain:
    try:
        with context.wrap_socket(plain) as tls:
            tls.sendall(Pool(pool_id, bytes(32)).preamble + bytes(33))
            print(tls.recv(1))
    except OSError:
        print(b"")
"""


@contextlib.contextmanager
def overheard(cluster: Cluster, address: str) -> Iterator[Path]:
    """All packets of one host, into a file."""
    capture = cluster.directory / "capture.pcap"
    argv = cluster.hosts[address].argv("tcpdump", "-i", "eth0", "-s", "0", "-U", "-B", "16384", "-w", str(capture))
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert b"listening on" in process.stderr.readline()
        yield capture
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=10)[1].decode()
    assert "0 packets dropped by kernel" in said, said


def weights(model: Path) -> list[bytes]:
    """Pieces of tensors that only backends hold: short enough to lie within one packet, most of the time."""
    rng = random.Random(0)
    found = []
    for tensor in GGUFReader(model).tensors:
        content = tensor.data.tobytes()
        if tensor.name.startswith("blk.") and len(content) > 4096:
            at = rng.randrange(len(content) - 64)
            found.append(content[at : at + 64])
    return found


@contextlib.contextmanager
def running(engine: Path, model: Path, *, secured: bool) -> Iterator[tuple[Cluster, Path]]:
    """Yield the cluster with the model loaded and asked once, and what was overheard of that at its coordinator."""
    with tempfile.TemporaryDirectory(prefix="sollol-tap-") as home:
        models = Path(home, "models")
        models.mkdir()
        (models / f"{MODEL}.gguf").write_bytes(model.read_bytes())
        caps = dict.fromkeys(ADDRESSES, CAP_BYTES)
        with seed_cluster(Path(home), caps=caps, model_dir=models, engine=engine, tls=secured) as cluster:
            with overheard(cluster, LARGE) as capture:
                asked = body(MODEL, max_tokens=50, messages=[{"role": "user", "content": PROMPT}])
                said = cluster.hosts[HEAD].run(sys.executable, "-c", ASK, URL, asked)
                assert '"choices"' in said.stdout, said.stdout + cluster.log_of("head")[-2000:]
            assert len(lenders_of(pool_seen(cluster, MODEL))) == 2
            yield cluster, capture


def seen_in(capture: Path, pieces: list[bytes]) -> int:
    content = capture.read_bytes()
    return sum(piece in content for piece in pieces)


def test_a_listener_reads_prompt_and_weights_when_bytes_go_plainly(engine_binary, reciting_model) -> None:
    """The control: the same capture finds what the next test must not find."""
    pieces = weights(reciting_model)
    with running(engine_binary, reciting_model, secured=False) as (_, capture):
        assert PROMPT.encode() in capture.read_bytes()
        assert seen_in(capture, pieces) > len(pieces) // 2


def test_with_certificates_a_listener_reads_nothing_and_nobody_else_gets_in(engine_binary, reciting_model) -> None:
    with running(engine_binary, reciting_model, secured=True) as (cluster, capture):
        assert capture.stat().st_size > reciting_model.stat().st_size // 2
        assert PROMPT.encode() not in capture.read_bytes()
        assert seen_in(capture, weights(reciting_model)) == 0
        pool = pool_seen(cluster, MODEL)
        lender = next(address for address in lenders_of(pool) if address not in (HEAD, address_of(pool["node_id"])))
        others = [address for address in ADDRESSES if address not in (lender, address_of(pool["node_id"]))]
        no_way_to_the_backend(cluster, lender, others)
        no_way_through_the_forwarder(cluster, pool, lender, others[0])
        a_pulled_cable_is_told(cluster, pool, lender)


def node_id_of(address: str) -> str:
    return f"node-{address.rsplit('.', 1)[1]}"


def no_way_to_the_backend(cluster: Cluster, lender: str, others: list[str]) -> None:
    (pid,) = engine_pids(cluster, lender, LENDING)
    port = listening_ports(pid, "0100007F")
    assert listening_ports(pid) == port
    for address in others:
        tried = cluster.hosts[address].run(sys.executable, "-c", CONNECT, lender, str(port[0]))
        assert "ConnectionRefusedError" in tried.stderr


def no_way_through_the_forwarder(cluster: Cluster, pool: dict[str, Any], lender: str, third: str) -> None:
    """Not for another node of the cluster, and not for the coordinator's own without the secret."""
    (pid,) = engine_pids(cluster, lender, "agent.forwarder")
    (port,) = listening_ports(pid)
    for node_id in (node_id_of(third), pool["node_id"]):
        identity = cluster.tls_dir("agent", node_id)
        knocked = cluster.hosts[third].run(
            sys.executable, "-P", "-c", KNOCK, lender, str(port), identity, pool["pool_id"]
        )
        assert knocked.stdout.strip() == "b''", knocked
    log = cluster.directory / lender / "log" / f"{pool['pool_id']}.backend.forwarder.log"
    for line in (
        f'"why": "wrong_node", "who": "agent {node_id_of(third)} of seed"',
        f'"why": "wrong_secret", "who": "agent {pool["node_id"]} of seed"',
    ):
        await_true(lambda line=line: line in log.read_text(), 10, lambda line=line: f"{line} in {log.read_text()}")


def a_pulled_cable_is_told(cluster: Cluster, pool: dict[str, Any], lender: str) -> None:
    with streaming(cluster, MODEL) as stream:
        cluster.hosts[lender].link_down()
        await_true(lambda: stream.ended_s, 20, "the stream ends")
        assert stream.error is not None
        assert node_id_of(lender) in stream.error["message"]
    answered = cluster.hosts[HEAD].run(sys.executable, "-c", ASK, URL, body(MODEL, max_tokens=50))
    assert '"choices"' in answered.stdout
    assert lender not in lenders_of(pool_seen(cluster, MODEL, besides=pool["pool_id"]))
    cluster.hosts[lender].link_up()


def listening_ports(pid: int, address: str = "") -> list[int]:
    """Of one process; `address` as the kernel writes it, empty for any."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(link.readlink()))
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        host, port = words[1].split(":")
        if words[3] == "0A" and f"socket:[{words[9]}]" in inodes and (not address or host == address):
            found.append(int(port, 16))
    return found
