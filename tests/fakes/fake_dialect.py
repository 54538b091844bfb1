"""llama-server's dialect for the fake engine: its flags, and its answers in the form of each endpoint."""

import asyncio
import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Flags:
    host: str = "127.0.0.1"
    port: int = 8080
    model: str = ""
    alias: str = ""
    context: int = 4096
    slots: int = 4
    knobs: dict[str, str] = field(default_factory=dict)

    def number(self, name: str, default: float = -1) -> float:
        return float(self.knobs.get(name, default))


def parse(argv: list[str]) -> Flags:
    flags = Flags()
    for name, value in zip(argv, [*argv[1:], ""], strict=True):
        match name:
            case "--host":
                flags.host = value
            case "--port":
                flags.port = int(value)
            case "-m" | "--model":
                flags.model = value
            case "-a" | "--alias":
                flags.alias = value
            case "-c" | "--ctx-size":
                flags.context = int(value)
            case "-np" | "--parallel":
                flags.slots = int(value)
            case "--fake":
                flags.knobs.update([value.split("=", 1)])
    markers = Path(flags.model).name.removesuffix(".gguf").split("@")[1:]
    flags.knobs.update(marker.split("=", 1) for marker in markers)
    return flags


class WatchedReader(asyncio.StreamReader):
    """Knows at once that the client closed its side; llama-server takes a half-close for a disconnect too."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


def prompt_of(request: object) -> str | None:
    if not isinstance(request, dict):
        return None
    if isinstance(request.get("prompt"), str):
        return str(request["prompt"])
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        return None
    return "\n".join(str(message.get("content")) for message in messages)


class Answer:
    """The frames of one answer in the form of its endpoint."""

    def __init__(self, path: str, request: dict[str, object], prompt: str, flags: Flags) -> None:
        self.path, self.request, self.used, self.alias = path, request, len(prompt.split()), flags.alias
        self.chat = path.endswith("/chat/completions")
        self.stream = bool(request.get("stream"))
        limit = request.get("max_tokens", request.get("max_completion_tokens", request.get("n_predict")))
        limit = limit if isinstance(limit, int) and limit >= 0 else None
        tokens = int(flags.number("tokens", 16 if limit is None else limit))
        self.count = tokens if limit is None else min(tokens, limit)
        self.finish = "length" if self.count == limit else "stop"
        said = re.search(r" t(\d+)$", prompt)
        self.first = int(said[1]) + 1 if said else 0

    def text(self, number: int) -> str:
        return f" t{self.first + number}"

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.used, "completion_tokens": self.count, "total_tokens": self.used + self.count}

    def frame(self, delta: dict[str, object] | str, finish: str | None = None) -> dict[str, object]:
        kind, key = ("chat.completion.chunk", "delta") if self.chat else ("text_completion", "text")
        choice = {"index": 0, key: delta, "finish_reason": finish}
        return {"id": "fake-1", "object": kind, "created": 0, "model": self.alias, "choices": [choice]}

    def token(self, number: int) -> dict[str, object]:
        if self.path == "/completion":
            common = {"index": 0, "stop": False, "id_slot": -1, "tokens_evaluated": self.used}
            tokens = {"tokens": [self.first + number], "tokens_predicted": number + 1}
            return {"content": self.text(number), **common, **tokens}
        return self.frame({"content": self.text(number)} if self.chat else self.text(number))

    def endings(self) -> list[dict[str, object]]:
        timings = {"timings": {"prompt_n": self.used, "predicted_n": self.count}}
        if self.path == "/completion":
            return [self.completion("") | timings]
        if not self.chat:
            return [self.frame("", self.finish) | {"usage": self.usage} | timings]
        last = self.frame({}, self.finish)
        options = self.request.get("stream_options")
        if not (isinstance(options, dict) and options.get("include_usage")):
            return [last | timings]
        return [last, self.frame({}) | {"choices": [], "usage": self.usage} | timings]

    def completion(self, content: str) -> dict[str, object]:
        kind = "limit" if self.finish == "length" else "eos"
        counts = {"tokens_predicted": self.count, "tokens_evaluated": self.used}
        return {"index": 0, "content": content, "stop": True, "stop_type": kind, "truncated": False, **counts}

    def whole(self) -> dict[str, object]:
        text = "".join(self.text(number) for number in range(self.count))
        if self.path == "/completion":
            return self.completion(text)
        if not self.chat:
            return self.frame(text, self.finish) | {"usage": self.usage}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish}
        return self.frame({}) | {"object": "chat.completion", "choices": [choice], "usage": self.usage}


class Reply:
    def __init__(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        self.client_gone, self.writer = reader.gone, writer

    async def whole(self, status: int, kind: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        await self.write(head.encode() + body)

    async def json(self, status: int, content: object) -> None:
        await self.whole(status, "application/json; charset=utf-8", json.dumps(content).encode())

    async def error(self, status: int, kind: str, message: str, **numbers: int) -> None:
        await self.json(status, {"error": {"code": status, "message": message, "type": kind, **numbers}})

    async def start_stream(self) -> None:
        await self.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
            b"X-Accel-Buffering: no\r\n\r\n"
        )

    async def event(self, content: object) -> None:
        await self.chunk(b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n")

    async def end_stream(self, frames: list[dict[str, object]], *, done: bool) -> None:
        for frame in frames:
            await self.event(frame)
        if done:
            await self.chunk(b"data: [DONE]\n\n")
        await self.write(b"0\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


async def read_request(reader: asyncio.StreamReader) -> tuple[str, str, bytes] | None:
    line = await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split(" ", 2)
    length = 0
    while (header := (await reader.readline()).decode().strip()) != "":
        name, _, value = header.partition(":")
        if name.lower() == "content-length":
            length = int(value)
    return method, path, await reader.readexactly(length)
