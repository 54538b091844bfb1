"""`make cluster-demo` (root): the seed's four nodes in network namespaces; a model that fits on none of them runs on all.

Prints the nodes, the decision with layers and bytes per node, the streamed answer, and whether it equals the answer of one
engine alone with the same flags: for a model that recites one text, and for one with random weights, whose next token
hangs on all the arithmetic before it. Leaves nothing running.
"""

import os
import sys
import tempfile
from pathlib import Path

from sollol.directories import cache_directory

from agent.engine.built import built_engine
from tests.cluster.network import processes_in
from tests.cluster.seed import ADDRESSES, Cluster, await_true, seed_cluster
from tests.real_engine import real_engine
from tests.tiny_model import write_random_model, write_reciting_model

RECITER, RANDOM = "tiny-reciter", "tiny-random"
CAP_BYTES = 172_000_000
QUESTION = "Who are you?"
PROMPT = "The people of the town"
TOKENS = 200
ALONE_PORT = 21_460
MEASURED_WITHIN_S = 60.0
# What the head's defaults become on an engine's command line, but for where the layers are.
SAME_FLAGS = (
    *("-c", "16384", "-np", "4", "--no-kv-unified", "-b", "512", "-ub", "512"),
    *("-ctk", "f16", "-ctv", "f16", "-ngl", "0", "--device", "none", "--jinja"),
)


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


def links_are_measured(cluster: Cluster) -> bool:
    placed = cluster.sollol("place", RECITER)
    return placed.returncode == 0 and "Not measured yet" not in placed.stdout


def alone(engine: Path, model: Path, directory: Path) -> tuple[str, str]:
    """The greedy answers of one engine without a cluster: to the question as chat, and to the bare prompt."""
    with real_engine(engine, model, ALONE_PORT, directory / "alone.log", *SAME_FLAGS) as one:
        chat = one.say(QUESTION)["message"]["content"]
        return chat, one.complete(PROMPT, n_predict=TOKENS, cache_prompt=False)["content"]


def compared(what: str, split: str, single: str) -> bool:
    """Say whether two texts are the same, and where they part if they are not."""
    ours, theirs = split.strip(), single.strip()
    same = ours == theirs
    at = next((at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), len(ours))
    told = f"equals that of a single engine ({at} characters)" if same else f"DIFFERS from character {at} on"
    show(f"The greedy answer of {what} over several nodes {told}.")
    return same


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
        write_reciting_model(models / f"{RECITER}.gguf")
        write_random_model(models / f"{RANDOM}.gguf", seed=0)
        show("Four hosts: 192.168.1.10 (head, small agent), .20 with the model, .21 and .22; each may use 164 MiB")
        caps = dict.fromkeys(ADDRESSES, CAP_BYTES)
        with seed_cluster(Path(directory), caps=caps, model_dir=models, engine=engine) as cluster:
            run(cluster, "nodes")
            await_true(lambda: links_are_measured(cluster), MEASURED_WITHIN_S, "the nodes have measured their links")
            run(cluster, "place", RECITER)
            recited = run(cluster, "run", RECITER, QUESTION, "--temperature", "0")
            run(cluster, "pools")
            run(cluster, "unload", RECITER)
            run(cluster, "place", RANDOM)
            greedy = ("--raw", "--temperature", "0", "--max-tokens", str(TOKENS))
            rambled = run(cluster, "run", RANDOM, PROMPT, *greedy)
            run(cluster, "unload", RANDOM)
            namespaces = [host.namespace for host in cluster.hosts.values()]
        same = compared(RECITER, recited, alone(engine, models / f"{RECITER}.gguf", Path(directory))[0])
        same &= compared(RANDOM, rambled, alone(engine, models / f"{RANDOM}.gguf", Path(directory))[1])
    left = [pid for namespace in namespaces for pid in processes_in(namespace)]
    show(f"Left running: {left or 'nothing'}.")
    return 0 if same and not left else 1


if __name__ == "__main__":
    sys.exit(main())
