"""The fake engine keeps its word: other tests believe what it plays."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from agent.supervisor.supervisor import Supervisor
from tests.fakes.fake_engine import fake_engine
from tests.supervised import plan_of, started, supervising
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with supervising(tmp_path, fake_engine()) as supervisor:
        yield supervisor


class Client:
    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def stream(self, path: str = CHAT, **request: object) -> AsyncIterator[str]:
        """Yield what follows `data:` in each frame."""
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True} | request
        async with self.session.post("http://engine" + path, json=body) as response:
            async for line in response.content:
                if line.startswith(b"data: "):
                    yield line[6:].decode().strip()

    async def texts(self, **request: object) -> list[str]:
        """Return the tokens of a stream, up to its end or its break."""
        found = []
        try:
            async for frame in self.stream(**request):
                if frame != "[DONE]" and (choices := json.loads(frame).get("choices")):
                    found.append(choices[0]["delta"].get("content"))  # noqa: PERF401 - what came before a break counts
        except aiohttp.ClientError:
            found.append("broken")
        return [text for text in found if text]

    async def get(self, path: str) -> object:
        async with self.session.get("http://engine" + path) as response:
            assert response.status == 200
            return await response.json()

    async def busy_slots(self) -> int:
        slots = await self.get("/slots")
        assert isinstance(slots, list)
        return sum(slot["is_processing"] for slot in slots)


@pytest.fixture
async def client(supervisor: Supervisor, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    """Talks to an engine whose model's name has the test's knobs."""
    await started(supervisor, "p", plan_of("m" + getattr(request, "param", "")))
    connector = aiohttp.UnixConnector(path=str(supervisor.socket_of("p")), limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield Client(session)


def knobs(text: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("client", [text], indirect=True)


async def test_a_stream_has_every_token_and_its_end(client: Client) -> None:
    frames = [frame async for frame in client.stream(max_tokens=3, stream_options={"include_usage": True})]
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["usage"]["completion_tokens"] == 3
    assert json.loads(frames[-3])["choices"][0]["finish_reason"] == "length"
    assert await client.texts(max_tokens=3) == [" t0", " t1", " t2"]


async def test_an_answer_goes_on_where_the_prompt_ends(client: Client) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " t0 t1"}]
    assert await client.texts(messages=messages, max_tokens=2) == [" t2", " t3"]


@knobs("@rate=100")
async def test_a_rate_paces_tokens(client: Client) -> None:
    begin = time.monotonic()
    await client.texts(max_tokens=31)
    assert 0.29 < time.monotonic() - begin < 2


@pytest.mark.parametrize(
    ("client", "end"),
    [("@die_after=2", ["broken"]), ("@cut_after=2", ["broken"]), ("@error_after=2", ["broken"])],
    indirect=["client"],
)
async def test_a_stream_breaks_after_the_given_tokens(client: Client, end: list[str]) -> None:
    assert await client.texts(max_tokens=9) == [" t0", " t1", *end]


@knobs("@hang_after=2")
async def test_a_hung_engine_is_still_healthy_and_its_slots_stand_still(client: Client) -> None:
    stream = asyncio.create_task(client.texts(max_tokens=9))
    await wait_until(client.busy_slots, what="a slot is busy")
    assert await client.get("/health") == {"status": "ok"}
    assert not stream.done()
    stream.cancel()
    await asyncio.wait({stream})


@knobs("@rate=20")
async def test_a_client_that_leaves_frees_its_slot(client: Client) -> None:
    stream = asyncio.create_task(client.texts(max_tokens=1000))
    await wait_until(client.busy_slots, what="a slot is busy")
    stream.cancel()

    async def free() -> bool:
        return await client.busy_slots() == 0

    await wait_until(free, within_s=1, what="the slot is free")


@knobs("@rate=50")
async def test_requests_beyond_the_slots_wait_their_turn(client: Client) -> None:
    begin = time.monotonic()
    answers = await asyncio.gather(*(client.texts(max_tokens=11) for _ in range(4)))
    assert time.monotonic() - begin > 0.39, "two slots serve four requests of 0.2 s in two rounds"
    assert all(answer == [f" t{number}" for number in range(11)] for answer in answers)
