"""Runs a real llama-server for one block of a test, without an agent."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msgspec import Struct

START_TIMEOUT_S = 30


class RealEngine(Struct):
    url: str
    log: Path

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def say(self, content: str, **more: Any) -> dict[str, Any]:
        """The first choice of a chat completion."""
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **more}
        return self.post("/v1/chat/completions", body)["choices"][0]

    def complete(self, prompt: str, **more: Any) -> dict[str, Any]:
        return self.post("/completion", {"prompt": prompt, "temperature": 0, **more})


@contextmanager
def real_engine(binary: Path, model: Path, port: int, log: Path, *flags: str) -> Iterator[RealEngine]:
    command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", "1", "--offline"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--no-ui", "-fit", "off", "--cache-ram", "0", *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/bin:/bin", "GGML_NO_BACKTRACE": "1"},
        )
    try:
        engine = RealEngine(f"http://127.0.0.1:{port}", log)
        _wait_ready(process, engine)
        yield engine
    finally:
        process.kill()
        process.wait(timeout=10)


def _wait_ready(process: subprocess.Popen[bytes], engine: RealEngine) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(engine.url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"llama-server is not ready: {engine.log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
