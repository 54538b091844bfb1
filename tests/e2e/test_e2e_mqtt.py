"""What the README says of MQTT, done: a real broker, the real `sollol up`, a real engine, and Mosquitto's own clients."""

import json
import shlex
import subprocess
from pathlib import Path

from tests.broker import Mosquitto
from tests.e2e import models
from tests.e2e.cluster import RECITAL_20
from tests.waiting import wait_until

README = Path(__file__).parents[2] / "README.md"


def printed(program: str, topic: str, broker: Mosquitto) -> list[str]:
    """A command line of the README, with our broker's port and our model's name."""
    lines = [line[2:] for line in README.read_text().splitlines() if line.startswith(f"$ {program} ")]
    (line,) = [line for line in lines if topic in shlex.split(line)]
    line = line.replace("qwen2.5-7b-instruct-q4_k_m", models.RECITER)
    return [*shlex.split(line), "-h", "127.0.0.1", "-p", str(broker.port)]


async def test_the_commands_of_the_readme_bring_an_answer_in_pieces(start_up, engine_binary, broker, tmp_path):
    up = start_up(engine_binary, words=("--mqtt-url", broker.url, "--mqtt-inference"))
    output = tmp_path / "answers"
    with output.open("wb") as out:
        listening = subprocess.Popen(printed("mosquitto_sub", "reply/kitchen", broker), stdout=out)
    try:
        await wait_until(lambda: "reply/kitchen" in broker.log, what="it has subscribed")
        heard = await broker.listen("sollol/#", "homeassistant/#")
        subprocess.run(printed("mosquitto_pub", "sollol/v1/default/generate", broker), check=True)

        def finished():
            messages = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
            return messages if messages and messages[-1].get("done") else None

        messages = await wait_until(finished, within_s=60, what="the last message")
        assert [message["sequence"] for message in messages] == list(range(len(messages)))
        assert messages[-1].get("error") is None, messages
        texts = [message["text"] for message in messages if "text" in message]
        assert "".join(texts).startswith(RECITAL_20)
        assert len(texts) > 1, "in pieces; a tiny engine says many tokens while the broker takes one"
        assert messages[-1]["usage"]["completion_tokens"] > 20

        def told():
            return [json.loads(event)["event"] for event in heard.on("sollol/v1/default/event")]

        await wait_until(lambda: told() == ["placement", "start", "ready"], what=f"what happened is told: {told()}")
        pool = next(topic for _, topic, _ in heard.messages if topic.startswith("sollol/v1/default/pool/"))
        await wait_until(lambda: json.loads(heard.last(pool) or "{}").get("state") == "READY", what="the pool is shown")
        subprocess.run(printed("mosquitto_pub", "sollol/v1/default/generate/cancel", broker), check=True)
        assert await up.end() == 0, up.errors
    finally:
        listening.kill()
        listening.wait()
    assert heard.last("sollol/v1/default/node/node-1/status") == "offline"
    assert heard.last(pool) == ""
    assert "homeassistant/device/sollol_node-1/config" in {topic for _, topic, _ in heard.messages}
