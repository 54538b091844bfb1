"""After a load, predicted and logged memory stand side by side, and the difference is remembered."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from msgspec.structs import replace
from sollol.correction import UNCORRECTED, Correction
from sollol.errors import Reason, refuse
from sollol.gguf_split import read_model
from sollol.memory import device_shares
from sollol.report import CoordinatorPlan, DeviceKind, Instance, Model
from sollol.shape import shape_of

from agent.learned import Learned
from agent.memory_account import MemoryAccount
from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, site_of, started, supervising, wish_of
from tests.waiting import wait_until

MIB = 1024**2
CPU = DeviceKind.CPU


class Books:
    """A supervisor's account over one model file."""

    def __init__(self, directory: Path, file: Path) -> None:
        self.learned = Learned(directory)
        self.shape = shape_of(read_model([file]))
        self.model = Model(name="tiny", size_bytes=1, identity="this file", shape=self.shape)
        self.account = MemoryAccount(self.model_of, self.learned)

    def model_of(self, name: str) -> Model:
        if name != self.model.name:
            raise refuse(Reason.MODEL_NOT_FOUND, f"no {name}")
        return self.model

    def plan(self, *split: tuple[str, int], correction: Correction = UNCORRECTED, **changes: object) -> CoordinatorPlan:
        """Layers on the coordinator's CPU, then on backends of nodes."""
        plan = replace(plan_of("tiny", context_per_slot=1024), **changes)
        shares = device_shares(
            self.shape,
            [("CPU", CPU, layers) for _, layers in split],
            context_per_slot=plan.context_per_slot,
            parallel=plan.parallel,
            kv_type=plan.kv_type,
            ubatch=plan.ubatch,
            correction=correction,
        )
        named = tuple(replace(share, node_id=node_id) for share, (node_id, _) in zip(shares, split, strict=True))
        return replace(plan, shares=named)

    @property
    def only(self) -> Correction:
        (known,) = self.learned.corrections()
        return known.correction


@pytest.fixture
def books(tmp_path: Path, reciting_model: Path) -> Books:
    return Books(tmp_path, reciting_model)


@asynccontextmanager
async def keeping(
    books: Books, tmp_path: Path, engine: tuple[str, ...], file: Path, **more: object
) -> AsyncIterator[Supervisor]:
    async with supervising(
        tmp_path, engine, resolve=lambda _: file, on_logged=books.account.loaded, **more
    ) as supervisor:
        yield supervisor


async def compared(supervisor: Supervisor) -> Instance:
    def shown() -> Instance | None:
        instance = next(each for each in supervisor.instances() if each.instance_id == "p")
        return instance if instance.shares[0].logged_bytes is not None else None

    found = await wait_until(shown, what="logged bytes are shown")
    assert found is not None
    return found


def says(plan: CoordinatorPlan, factor: float) -> str:
    """What a fake engine logs that takes so many times the memory of the plan, all on its CPU."""
    (share,) = plan.shares
    sizes = {"model": share.weight_bytes, "KV": share.kv_bytes, "compute": share.compute_bytes}
    lines = [f"CPU_{kind}_buffer_size_=_{size * factor / MIB:.2f}_MiB" for kind, size in sizes.items()]
    return "says=loading_model_tensors;" + ";".join(lines)


async def test_an_engine_that_takes_more_than_predicted_is_told_and_remembered(
    books: Books, tmp_path: Path, reciting_model: Path
) -> None:
    plan = books.plan(("", 9))
    with structlog.testing.capture_logs() as logs:
        async with keeping(books, tmp_path, fake_engine(says(plan, 1.2)), reciting_model) as supervisor:
            await started(supervisor, "p", plan)
            instance = await compared(supervisor)

    (share,) = instance.shares
    predicted = share.total_bytes - share.margin_bytes
    assert share.logged_bytes == pytest.approx(1.2 * predicted, abs=MIB // 50)
    (told,) = [each for each in logs if each["event"] == "memory_compared"]
    (device,) = told["devices"]
    assert (device["device"], device["predicted_bytes"], device["logged_bytes"]) == (
        "CPU",
        predicted,
        share.logged_bytes,
    )
    assert device["error_percent"] == pytest.approx(-16.7, abs=0.1)
    known = books.learned.corrections()[0]
    assert (known.identity, known.context_per_slot, known.layout) == ("this file", 1024, "CPU:9")
    for factor in (known.correction.weights, known.correction.kv, known.correction.compute):
        assert factor == pytest.approx(1.2, rel=0.01)


async def test_a_plan_that_was_corrected_already_teaches_the_same_again(
    books: Books, tmp_path: Path, reciting_model: Path
) -> None:
    """Else what was learned once would be unlearned with the next load."""
    engine = fake_engine(says(books.plan(("", 9)), 1.2))
    async with keeping(books, tmp_path, engine, reciting_model) as supervisor:
        await started(supervisor, "p", books.plan(("", 9)))
        await compared(supervisor)
        first = books.only
        await supervisor.stop("p")
        await started(supervisor, "p", books.plan(("", 9), correction=first))
        instance = await compared(supervisor)
    assert books.only == first
    (share,) = instance.shares
    assert share.logged_bytes is not None
    assert 0 <= share.total_bytes - share.margin_bytes - share.logged_bytes < MIB // 10


@pytest.mark.parametrize("kept", [("loading", "model", "KV"), ("loading",)])
async def test_a_log_that_lost_a_line_teaches_nothing(
    books: Books, tmp_path: Path, reciting_model: Path, kept: tuple[str, ...]
) -> None:
    plan = books.plan(("", 9))
    lines = [line for line in says(plan, 1.2).split(";") if any(word in line for word in kept)]
    with structlog.testing.capture_logs() as logs:
        async with keeping(books, tmp_path, fake_engine(";".join(lines)), reciting_model) as supervisor:
            await started(supervisor, "p", plan)
            await wait_until(
                lambda: [each for each in logs if each["event"] == "memory_not_compared"], what="it is told"
            )
            assert supervisor.instances()[0].shares == plan.shares
    assert books.learned.corrections() == ()


async def test_a_model_whose_file_is_gone_by_then_teaches_nothing(
    books: Books, tmp_path: Path, reciting_model: Path
) -> None:
    plan = books.plan(("", 9), model="another")
    async with keeping(books, tmp_path, fake_engine(says(plan, 1.2)), reciting_model) as supervisor:
        await started(supervisor, "p", plan)
        await compared(supervisor)
    assert books.learned.corrections() == ()


async def test_a_stop_does_not_wait_for_the_comparison(books: Books, tmp_path: Path, reciting_model: Path) -> None:
    async with keeping(books, tmp_path, fake_engine(), reciting_model) as supervisor:
        await started(supervisor, "p", books.plan(("", 9)))
        await asyncio.wait_for(supervisor.stop("p"), 2)
        assert supervisor.instances() == ()


@pytest.mark.engine
@pytest.mark.parametrize("changes", [{}, {"kv_type": "q8_0", "parallel": 3}])
async def test_the_real_engine_takes_what_was_predicted(
    books: Books, tmp_path: Path, reciting_model: Path, engine_binary: Path, changes: dict[str, object]
) -> None:
    async with keeping(books, tmp_path, (str(engine_binary),), reciting_model) as supervisor:
        await started(supervisor, "p", books.plan(("", 9), **changes))
        instance = await compared(supervisor)
    (share,) = instance.shares
    assert share.logged_bytes == pytest.approx(share.total_bytes - share.margin_bytes, rel=0.01)
    assert books.only == UNCORRECTED


@pytest.mark.engine
async def test_over_backends_it_does_on_each_device(
    books: Books, tmp_path: Path, reciting_model: Path, engine_binary: Path, ports: Callable[[], int]
) -> None:
    port = ports()
    site = site_of(engine_binary.parent / "ggml-rpc-server", ports=range(port, port + 40))
    async with keeping(books, tmp_path, (str(engine_binary),), reciting_model, site=site) as supervisor:
        first, second = [await supervisor.start_backend(wish_of(name)) for name in ("b1", "b2")]
        backends = (replace(first, node_id="b1"), replace(second, node_id="b2"))
        await started(supervisor, "p", replace(books.plan(("", 0), ("b1", 4), ("b2", 5)), backends=backends))
        instance = await compared(supervisor)
    for share in instance.shares:
        assert share.logged_bytes == pytest.approx(share.total_bytes - share.margin_bytes, abs=MIB // 10)
    (known,) = books.learned.corrections()
    assert (known.layout, known.correction) == ("CPU:0 CPU:4 CPU:5", UNCORRECTED)
