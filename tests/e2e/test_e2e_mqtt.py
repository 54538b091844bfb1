"""What the README says of MQTT, done: a real broker, the real `sollol up`, a real engine, and Mosquitto's own clients."""

import json
import shlex
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import Struct

from agent.speed_meter import counters_of
from tests.broker import Mosquitto
from tests.e2e import models
from tests.tiny_model import PIECES
from tests.waiting import wait_until

pytestmark = pytest.mark.engine
README = Path(__file__).parents[2] / "README.md"
REPLY, GENERATE = "reply/kitchen", "sollol/v1/default/generate"
SAID = 24
ATTEMPTS = 5


def printed(program: str, topic: str, broker: Mosquitto, **changed: str) -> list[str]:
    """A command line of the README, with our broker's port and our model's name; `changed` are words of it."""
    lines = [line[2:] for line in README.read_text().splitlines() if line.startswith(f"$ {program} ")]
    (line,) = [line for line in lines if topic in shlex.split(line)]
    line = line.replace("qwen2.5-7b-instruct-q4_k_m", models.SLOW)
    for was, is_now in changed.items():
        assert was in line
        line = line.replace(was, is_now)
    return [*shlex.split(line), "-h", "127.0.0.1", "-p", str(broker.port)]


class Message(Struct):
    came_unix_s: float
    content: dict


class Device:
    """The README's `mosquitto_sub`, which notes when each message came and whose answer it is."""

    def __init__(self, broker: Mosquitto, output: Path) -> None:
        self._broker, self._output = broker, output

    @contextmanager
    def listening(self):
        with self._output.open("wb") as out:
            command = [*printed("mosquitto_sub", REPLY, self._broker), "-F", "%U %D %p"]
            process = subprocess.Popen(command, stdout=out)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def ask(self, correlation: str, **changed: str) -> None:
        words = {"correlation-data 1": f"correlation-data {correlation}", **changed}
        subprocess.run(printed("mosquitto_pub", GENERATE, self._broker, **words), check=True)

    def cancel(self, correlation: str) -> None:
        words = {"correlation-data 1": f"correlation-data {correlation}"}
        subprocess.run(printed("mosquitto_pub", f"{GENERATE}/cancel", self._broker, **words), check=True)

    def heard(self, correlation: str) -> list[Message]:
        rows = [line.split(" ", 2) for line in self._output.read_text().split("\n")[:-1]]
        return [Message(float(came), json.loads(payload)) for came, whose, payload in rows if whose == correlation]

    def pieces(self, correlation: str) -> list[Message]:
        return [message for message in self.heard(correlation) if "text" in message.content]

    async def last(self, correlation: str) -> dict:
        def done():
            messages = self.heard(correlation)
            return messages if messages and messages[-1].content.get("done") else None

        messages = await wait_until(done, within_s=60, what="the last message")
        assert [message.content["sequence"] for message in messages] == list(range(len(messages)))
        return messages[-1].content


@pytest.fixture
async def device(broker, tmp_path):
    found = Device(broker, tmp_path / "answers")
    with found.listening():
        await wait_until(lambda: REPLY in broker.log, what="it has subscribed")
        yield found


async def generating_s(up, pool):
    """What the engine says that it has generated for so far."""
    async with up.engine(pool) as session, session.get("http://engine/metrics") as response:
        return counters_of(await response.read()).seconds


async def test_a_device_with_the_commands_of_the_readme_hears_each_token_when_the_engine_says_it(
    start_up, engine_binary, broker, device
):
    up = start_up(engine_binary, words=("--mqtt-url", broker.url, "--mqtt-inference"))
    heard = await broker.listen("sollol/#", "homeassistant/#")

    async def answer(correlation):
        """How many tokens came alone, and the seconds from the first to the last."""
        device.ask(correlation, **{'"max_tokens": 200': f'"max_tokens": {SAID}'})
        last = await device.last(correlation)
        assert last.get("error") is None, last
        assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("length", SAID)
        pieces = device.pieces(correlation)
        texts = [piece.content["text"] for piece in pieces]
        assert "".join(texts) == "".join(PIECES[:SAID]), "in order, each once"
        return len(set(texts) & set(PIECES)), pieces[-1].came_unix_s - pieces[0].came_unix_s

    await answer("first")
    pool = await up.ready_pool(models.SLOW)

    async def token_by_token(attempt):
        before_s = await generating_s(up, pool)
        alone, took_s = await answer(f"{attempt}")
        engine_s = await generating_s(up, pool) - before_s
        tried.append((alone, round(took_s, 3), round(engine_s, 3)))
        return alone > SAID * 2 // 3 and took_s > engine_s / 2

    tried: list[tuple[int, float, float]] = []
    # A head that the machine holds up for longer than a token takes says the next two in one message.
    while not await token_by_token(len(tried)):
        assert len(tried) < ATTEMPTS, f"of {SAID} tokens (came alone, within s, generated in s): {tried}"

    def told():
        return [json.loads(event)["event"] for event in heard.on("sollol/v1/default/event")]

    await wait_until(lambda: told() == ["placement", "start", "ready"], what=f"what happened is told: {told()}")
    state = f"sollol/v1/default/pool/{pool.instance.instance_id}/state"
    await wait_until(lambda: json.loads(heard.last(state) or "{}").get("state") == "READY", what="the pool is shown")

    device.ask("long")
    await wait_until(lambda: device.pieces("long"), what="it is answered")
    device.cancel("long")
    assert (await device.last("long"))["error"]["reason"] == "CANCELLED"
    assert len(device.pieces("long")) < 200

    assert await up.end() == 0, up.errors
    await heard.says("sollol/v1/default/node/node-1/status", "offline")
    await heard.says(state, "")
    assert "homeassistant/device/sollol_default_node-1/config" in {topic for _, topic, _ in heard.messages}
