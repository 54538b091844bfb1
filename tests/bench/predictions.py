"""Predicted against measured tokens per second over real plans: `python -m tests.bench.predictions --write docs/speed.md`.

A head and three agents on this machine, the real engine, models of two sizes. Each plan is the head's own decision. It
is loaded, answers once through the head, which the agent observes, and is then measured by more answers. A plan during
which other programs used the processors is run again, its observation forgotten.
"""

import argparse
import asyncio
import contextlib
import os
import random
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from msgspec import Struct
from sollol.client import Client
from sollol.directories import cache_directory
from sollol.gguf_split import read_model
from sollol.memory import device_shares
from sollol.report import CoordinatorPlan, DeviceKind, PlacementWish, Pool, Report
from sollol.shape import shape_of

from agent.engine.built import built_engine
from agent.speed_meter import MIN_TOKENS, SETTLE_S
from agent.speeds import FILE_NAME
from sollold.placement.explain import layers_text
from sollold.placement.observed import observed_of
from tests.architecture_tensors import Sizes
from tests.bench.predicted import Plan, as_page, as_table, row, verdict
from tests.bench.quiet import Others
from tests.e2e.cluster import text_of
from tests.e2e.daemons import ByHand, short_home
from tests.many_architectures import ARCHITECTURES, Q4_0, write_model
from tests.waiting import wait_until

NODES = ("n1", "n2", "n3")
# Larger than the cache that this machine shares with others, as people's models are: how much of a smaller one the cache
# holds changes from second to second, and its speed with it (76 MiB were read at 13 to 21 GB/s, 256 MiB at 11.1 to 11.4).
MODELS = {
    "small-F16": Sizes(layers=12, embedding=1024, heads=16, kv_heads=4, head=64, feed_forward=2816, vocabulary=2048),
    "large-F16": Sizes(layers=10, embedding=1536, heads=24, kv_heads=6, head=64, feed_forward=4096, vocabulary=2048),
    "large-Q4_0": Sizes(
        layers=12,
        embedding=2048,
        heads=32,
        kv_heads=8,
        head=64,
        feed_forward=5632,
        vocabulary=2048,
        quantization=Q4_0,
    ),
}
CONTEXT = 1024
PORTS = range(20_000, 32_000)
WITHIN_S = 30.0
RUNS = 3
RUN_S = 4.0
ROUNDS = 5
QUIET_WITHIN_S = 20
# Of what the large model needs on one node, so that its layers are dealt out more evenly than would be fastest.
TIGHT = 0.85


class Setup(Struct, frozen=True, kw_only=True):
    """How the agents are started, and for how many backends of which models plans are asked for then."""

    threads: int
    backends: tuple[int, ...]
    tight: bool = False
    models: tuple[str, ...] = tuple(MODELS)

    @property
    def wishes(self) -> tuple[PlacementWish, ...]:
        return tuple(
            PlacementWish(
                model=model, context_per_slot=CONTEXT, parallel=1, backends_per_pool=backends, pinned_node=NODES[0]
            )
            for model in self.models
            for backends in self.backends
        )


# Threads of several engines never add up to more than the cores: those that wait for each other would spin.
SETUPS = (
    Setup(threads=1, backends=(0, 1, 3)),
    Setup(threads=1, backends=(2,), tight=True, models=("small-F16", "large-F16")),
    Setup(threads=2, backends=(0, 1)),
)


class DisturbedError(Exception):
    """Other programs used the processors: what was measured says nothing."""


class Bench:
    """`quiet`: how much of one processor others may use during a run that counts."""

    def __init__(
        self, cluster: ByHand, client: Client, cap_bytes: int, *, quiet: float, told: Callable[[str], None]
    ) -> None:
        self._cluster, self._client, self._cap_bytes = cluster, client, cap_bytes
        self._quiet, self._told = quiet, told

    async def plans(self) -> list[Plan]:
        """Every plan of every setup, in seven minutes when nothing disturbs."""
        found: list[Plan] = []
        for setup in SETUPS:
            wishes: Sequence[PlacementWish] = setup.wishes
            for _ in range(ROUNDS):
                async with self._agents(setup):
                    wishes = [wish for wish in wishes if not await self._add(found, setup, wish)]
                if not wishes:
                    break
            else:
                raise DisturbedError("others use the processors all the time: come back when this machine is quiet")
        return found

    async def _add(self, found: list[Plan], setup: Setup, wish: PlacementWish) -> bool:
        try:
            found.append(await self._plan(setup, wish))
        except DisturbedError as error:
            self._told(f"{wish.model}, {wish.backends_per_pool} backends: again, {error}")
            return False
        self._told("  ".join(row(found[-1])))
        return True

    @contextlib.asynccontextmanager
    async def _agents(self, setup: Setup) -> AsyncIterator[None]:
        """Agents that have observed nothing yet."""
        cluster = self._cluster
        cap = ("--caps", f"CPU={self._cap_bytes}") if setup.tight else ()
        flags = ("--threads", str(setup.threads), "--ollama-dir", "", "--huggingface-dir", "", *cap)
        for node in NODES:
            (cluster.state / node / FILE_NAME).unlink(missing_ok=True)
            cluster.start_agent(node, *flags)

        async def all_seen() -> bool:
            reports = [node.report for node in await self._client.nodes() if node.connected]
            return len([report for report in reports if _started_for(report, setup)]) == len(NODES)

        await wait_until(all_seen, within_s=WITHIN_S, what="the head sees the agents")
        try:
            yield
        finally:
            for node in NODES:
                cluster.processes[node].terminate()
                cluster.processes[node].wait(WITHIN_S)

    async def _plan(self, setup: Setup, wish: PlacementWish) -> Plan:
        client = self._client
        decision = await client.place(wish)
        assert decision.plan is not None, decision.refusal
        plan = decision.plan
        pool = await client.load(wish)
        try:
            observed_ms, runs_ms = await self._measured(pool, plan)
        finally:
            await client.unload(wish.model)
            await self._cluster.only_ready_pools_are_reserved()
        return Plan(
            model=wish.model,
            read_bytes=sum(share.weight_bytes for share in plan.shares if share.layers),
            threads=setup.threads,
            backends=wish.backends_per_pool or 0,
            layers=" + ".join(
                f"{share.node_id or 'own'} {layers_text(share)}" for share in plan.shares if share.layers
            ),
            predicted_ms=plan.predicted_ms_per_token,
            observed_ms=observed_ms,
            runs_ms=runs_ms,
        )

    async def _measured(self, pool: Pool, plan: CoordinatorPlan) -> tuple[float, tuple[float, ...]]:
        """What one answer has the head count with, and ms per token of those that follow."""
        loop = asyncio.get_running_loop()
        ready_s = loop.time()
        tokens = max(MIN_TOKENS, int(RUN_S * 1000 / plan.predicted_ms_per_token))
        await self._answer_ms(plan.model, MIN_TOKENS)
        await wait_until(lambda: loop.time() > ready_s + SETTLE_S, what="the pool has settled")
        async with self._alone():
            await self._answer_ms(plan.model, tokens)
        await wait_until(lambda: self._is_observed(pool), within_s=WITHIN_S, what="the answer is observed")
        observed_ms = await self._after_observation(plan)
        async with self._alone():
            runs_ms = tuple([await self._answer_ms(plan.model, tokens) for _ in range(RUNS)])
        return observed_ms, runs_ms

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        for _ in range(QUIET_WITHIN_S):
            others = self._others()
            await asyncio.sleep(1)
            if others.cores_used <= self._quiet:
                break
        others = self._others()
        yield
        if others.cores_used > self._quiet:
            raise DisturbedError(f"other programs used {others.cores_used:.2f} processors meanwhile")

    def _others(self) -> Others:
        return Others(process.pid for process in self._cluster.processes.values())

    async def _answer_ms(self, model: str, tokens: int) -> float:
        """Milliseconds per token of one answer, as its reader sees it: from the first token to the last."""
        clock = asyncio.get_running_loop().time
        async with self._cluster.stream(model, max_tokens=tokens) as events:
            came_s = [clock() async for event in events if text_of(event)]
        assert len(came_s) == tokens, f"{len(came_s)} of {tokens} tokens came"
        return 1000 * (came_s[-1] - came_s[0]) / (tokens - 1)

    async def _is_observed(self, pool: Pool) -> bool:
        instance_id = pool.instance.instance_id
        instances = [each.instance for each in await self._client.pools()]
        return any(each.observed_ms_per_token for each in instances if each.instance_id == instance_id)

    async def _after_observation(self, plan: CoordinatorPlan) -> float:
        """What placement says of the same plan now, from the reports that it decides on."""
        nodes = await self._client.nodes()
        models = [next((each for each in node.report.models if each.name == plan.model), None) for node in nodes]
        threads = {node.report.node_id: node.report.engine.threads for node in nodes if node.report.engine}
        predicted_ms = plan.predicted_ms_per_token
        part = observed_of(nodes, models).correction(
            NODES[0], plan.shares, plan.kv_type, lambda node_id: threads[node_id or NODES[0]], predicted_ms
        )
        assert part.name == "observed_ms", part
        return predicted_ms + part.value


def _started_for(report: Report, setup: Setup) -> bool:
    capped = report.devices[0].cap_bytes is not None
    started = report.engine is not None and report.engine.threads == setup.threads and capped == setup.tight
    return started and not report.speeds


def _write_whole(path: Path, sizes: Sizes) -> None:
    """With real blocks instead of holes: how the kernel caches these is a matter of luck, and so is their speed."""
    write_model(path, ARCHITECTURES["llama"], sizes)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def _tight_bytes(path: Path) -> int:
    shape = shape_of(read_model([path]))
    (whole,) = device_shares(
        shape,
        [("CPU", DeviceKind.CPU, shape.layers + 1)],
        context_per_slot=CONTEXT,
        parallel=1,
        kv_type="f16",
        ubatch=512,
    )
    return int(whole.total_bytes * TIGHT)


def _free_ports() -> Iterator[int]:
    start = random.SystemRandom().choice(PORTS)
    for port in (*range(start, PORTS.stop), *range(PORTS.start, start)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


async def measure(*, quiet: float, told: Callable[[str], None]) -> list[Plan]:
    engine = built_engine(cache_directory(os.environ))
    if engine is None:
        sys.exit("no llama-server: run `sollol engine build` first")
    with tempfile.TemporaryDirectory(prefix="sollol-bench-") as folder, short_home() as home:
        models = Path(folder)
        for name, sizes in MODELS.items():
            _write_whole(models / f"{name}.gguf", sizes)
        cluster = ByHand(home, _free_ports().__next__, models=models, engine=engine)
        try:
            cluster.start_redis()
            cluster.start_head()
            await cluster.nodes_seen(0)
            async with cluster.client() as client:
                cap_bytes = _tight_bytes(models / "large-F16.gguf")
                return await Bench(cluster, client, cap_bytes, quiet=quiet, told=told).plans()
        finally:
            cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="compare predicted with measured tokens per second")
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument(
        "--quiet", type=float, default=0.15, help="processors that other programs may use during a run (default 0.15)"
    )
    arguments = parser.parse_args()
    told = partial(print, file=sys.stderr, flush=True)
    try:
        plans = asyncio.run(measure(quiet=arguments.quiet, told=told))
    except DisturbedError as error:
        sys.exit(str(error))
    print(as_table(plans))
    if arguments.write is not None:
        arguments.write.write_text(as_page(plans))
    if not verdict(plans).holds:
        sys.exit("the predictions are not as good as they should be")


if __name__ == "__main__":
    main()
