"""`make cluster-demo` (root): the seed's four nodes in network namespaces; a model that fits on none of them runs on all.

Prints the nodes, the decision with layers and bytes per node, the streamed answer, and whether it equals the answer of one
engine alone with the same flags. Leaves nothing running.
"""

import os
import sys
import tempfile
from pathlib import Path

from sollol.directories import cache_directory

from agent.engine.built import built_engine
from tests.cluster.network import processes_in
from tests.cluster.seed import ADDRESSES, Cluster, seed_cluster
from tests.tiny_model import RECITAL, write_reciting_model

MODEL = "tiny-reciter"
CAP_BYTES = 172_000_000
QUESTION = "Who are you?"


def show(title: str, text: str = "") -> None:
    print(f"\033[1m{title}\033[0m" if sys.stdout.isatty() else title)
    if text:
        print(text.rstrip())
    print(flush=True)


def run(cluster: Cluster, *arguments: str) -> str:
    done = cluster.sollol(*arguments)
    show(f"$ sollol {' '.join(arguments)}", done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"sollol {arguments[0]} ended with {done.returncode}")
    return str(done.stdout)


def main() -> int:
    if os.geteuid() != 0:
        print("cluster-demo makes network namespaces and needs root: try `sudo make cluster-demo`", file=sys.stderr)
        return 1
    engine = built_engine(cache_directory(os.environ))
    if engine is None:
        print("no engine with RPC is built yet: `sollol engine build` first", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sollol-") as directory:
        models = Path(directory) / "models"
        models.mkdir()
        write_reciting_model(models / f"{MODEL}.gguf")
        show("Four hosts: 192.168.1.10 (head, small agent), .20 with the model, .21 and .22; each may use 164 MiB")
        caps = dict.fromkeys(ADDRESSES, CAP_BYTES)
        with seed_cluster(Path(directory), caps=caps, model_dir=models, engine=engine) as cluster:
            run(cluster, "nodes")
            run(cluster, "place", MODEL)
            answer = run(cluster, "run", MODEL, QUESTION)
            run(cluster, "pools")
            run(cluster, "unload", MODEL)
            namespaces = [host.namespace for host in cluster.hosts.values()]
    same = answer.strip() == RECITAL.strip()
    show(f"The greedy answer over four nodes {'equals' if same else 'DIFFERS from'} the one of a single engine.")
    left = [pid for namespace in namespaces for pid in processes_in(namespace)]
    show(f"Left running: {left or 'nothing'}.")
    return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
