"""A real process that plays llama-server: same flags, same HTTP, same exits; faults and speed on demand.

Start it as `fake_engine(*knobs)` + llama-server's flags; unknown flags are ignored. It needs no third-party package and
answers about 0.1 s after exec. It generates " t0 t1 t2 ...": every lost or repeated token shows. A prompt (or assistant
prefill) that ends with " t7" is continued with " t8".

Knobs are `name=value`, each given as `--fake name=value` or as a marker in the model's file name,
`tiny@rate=50@die_after=5.gguf` (engines get an environment from scratch, so there is no environment variable):

  tokens=16         most tokens of an answer, ended with finish_reason "stop"; a request's own limit gives "length"
  rate=0            tokens per second and stream; 0: as fast as possible
  computes_s=0      CPU seconds that each token takes; one that takes none for seconds stands still
  prompt_s=0        seconds before the first token (headers are sent at once, as llama-server does)
  load_s=0          seconds that loading takes, with 503 on /health and progress lines in child mode
  progress=1        0: no progress lines, as older engines
  stall_at=0.5      loading stops for ever at this fraction
  die=LINE          write LINE to stderr and exit with `exit` at start ("_" stands for a space)
  die_at=0.5        do so only when this fraction is loaded
  exit=1            the exit status of die; negative: end by that signal
  die_after=5       SIGKILL itself once a stream has sent 5 tokens
  hang_after=5      streams send nothing more after 5 tokens; /health, /slots go on
  cut_after=5       close the connection after 5 tokens, with no terminal event
  error_after=5     send an error frame after 5 tokens and end
  ignore_term=1     SIGTERM and the exit command do nothing
  grandchild=1      start a child process (same group) that sleeps; stderr says "grandchild pid=N"
  flood=100000      bytes of stderr to write before anything else
  says=LINE;LINE    lines to write to stderr while it loads ("_" stands for a space)

Like the real one: an existing socket path makes bind fail and is left behind on exit; SIGTERM waits for open streams and
ends the process at once while loading; in child mode (LLAMA_SERVER_ROUTER_PORT) a served SIGTERM also needs the exit
command or EOF on stdin; a client that leaves frees its slot; requests beyond -np wait without headers.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

if __package__:
    from tests.fakes.fake_dialect import Answer, Flags, Reply, WatchedReader, parse, prompt_of, read_request
else:  # run as a script: python has put this directory on sys.path
    from fake_dialect import Answer, Flags, Reply, WatchedReader, parse, prompt_of, read_request


def fake_engine(*knobs: str) -> tuple[str, ...]:
    """Return the argv prefix to use in place of `("llama-server",)`."""
    flags = [part for knob in knobs for part in ("--fake", knob)]
    return (sys.executable, "-S", "-E", __file__, *flags)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Slot:
    number: int
    busy: bool = False
    decoded: int = 0
    remaining: int = 0


class Engine:
    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.child_mode = "LLAMA_SERVER_ROUTER_PORT" in os.environ
        self.ready = self.signalled = False
        self.stopping = asyncio.Event()
        self.told_to_exit = asyncio.Event()
        self.slots = [Slot(number) for number in range(flags.slots)]
        self.free = asyncio.Semaphore(flags.slots)
        self.streams: set[asyncio.Task[None]] = set()
        self.decodes = self.predicted = 0
        self.predicted_s = 0.0

    async def run(self) -> int:
        server = await self.bind()
        if server is None:
            return 1
        if not Path(self.flags.model).exists():
            log(f"E gguf_init_from_file: failed to open GGUF file '{self.flags.model}' (No such file or directory)")
            log("E srv llama_server: exiting due to model loading error")
            return 1
        await self.load()
        await self.serve()
        log("I srv operator(): cleaning up before exit...")
        return 0

    async def bind(self) -> asyncio.Server | None:
        host = self.flags.host
        loop = asyncio.get_running_loop()
        try:
            if not host.endswith(".sock"):
                return await loop.create_server(self.protocol, host, self.flags.port, backlog=1024)
            if not Path(host).exists():
                return await loop.create_unix_server(self.protocol, host, backlog=1024)
        except OSError:
            pass
        log(f"E srv start: couldn't bind HTTP server socket, hostname: {host}, port: {self.flags.port}")
        log("E srv llama_server: exiting due to HTTP server error")
        return None

    def protocol(self) -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(WatchedReader(), self.connection)

    async def load(self) -> None:
        steps = 20 if self.flags.number("load_s", 0) or self.flags.knobs.keys() & {"die_at", "stall_at"} else 1
        for step in range(steps + 1):
            value = step / steps
            self.tell("loading", {"stages": ["text_model"], "current": "text_model", "value": value})
            if 0 <= self.flags.number("die_at") <= value:
                die(self.flags)
            if 0 <= self.flags.number("stall_at") <= value:
                await asyncio.Event().wait()
            await asyncio.sleep(self.flags.number("load_s", 0) / steps)
        for line in self.flags.knobs.get("says", "").split(";"):
            log(line.replace("_", " "))

    def tell(self, state: str, payload: object) -> None:
        if self.child_mode and self.flags.number("progress", 1):
            print("\ncmd_child_to_router:state:" + json.dumps({"state": state, "payload": payload}), flush=True)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.terminate)
        if self.child_mode:
            threading.Thread(target=self.read_stdin, args=(loop,), daemon=True).start()
        self.ready = True
        where = self.flags.host if self.flags.host.endswith(".sock") else f"{self.flags.host}:{self.flags.port}"
        log(f"I srv llama_server: model loaded\nI srv llama_server: listening on {where}")
        self.tell("ready", {"id": self.flags.alias, "meta": {}})
        await self.stopping.wait()
        if self.streams:
            await asyncio.wait(self.streams)
        if self.child_mode:
            await self.told_to_exit.wait()

    def terminate(self) -> None:
        if self.flags.number("ignore_term", 0):
            return
        if self.signalled:
            log("Received second interrupt, terminating immediately.")
            os._exit(1)
        self.signalled = True
        self.stopping.set()

    def read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        for line in sys.stdin:
            if "cmd_router_to_child:exit" in line and not self.flags.number("ignore_term", 0):
                loop.call_soon_threadsafe(self.told_to_exit.set)
                loop.call_soon_threadsafe(self.stopping.set)
                return
        if not self.flags.number("ignore_term", 0):
            os._exit(1)

    async def connection(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await read_request(reader):
                await self.answer(*request, Reply(reader, writer))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client left; there is nobody to tell
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: bytes, reply: Reply) -> None:
        path = path.split("?", maxsplit=1)[0]
        if not self.ready:
            await reply.error(503, "unavailable_error", "Loading model")
        elif method == "GET":
            await self.answer_get(path, reply)
        elif path in ("/completion", "/v1/completions", "/v1/chat/completions"):
            await self.generate(path, body, reply)
        else:
            await reply.error(404, "not_found_error", "File Not Found")

    async def answer_get(self, path: str, reply: Reply) -> None:
        context = self.flags.context // self.flags.slots
        pages: dict[str, object] = {
            "/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [{"id": self.flags.alias, "object": "model"}]},
            "/props": {
                "build_info": "fake",
                "total_slots": self.flags.slots,
                "default_generation_settings": {"n_ctx": context},
                "model_path": self.flags.model,
            },
            "/slots": [
                {
                    "id": slot.number,
                    "n_ctx": context,
                    "is_processing": slot.busy,
                    "next_token": [{"n_decoded": slot.decoded, "n_remain": slot.remaining}],
                }
                for slot in self.slots
            ],
        }
        if path == "/metrics":
            figures = {
                "n_decode_total": self.decodes,
                "tokens_predicted_total": self.predicted,
                "tokens_predicted_seconds_total": f"{self.predicted_s:.6g}",
            }
            page = "".join(f"llamacpp:{name} {figure}\n" for name, figure in figures.items())
            await reply.whole(200, "text/plain", page.encode())
        elif path in pages:
            await reply.json(200, pages[path])
        else:
            await reply.error(404, "not_found_error", "File Not Found")

    async def generate(self, path: str, body: bytes, reply: Reply) -> None:
        try:
            request = json.loads(body)
        except ValueError as error:
            await reply.error(500, "server_error", str(error))
            return
        prompt = prompt_of(request)
        if prompt is None:
            await reply.error(400, "invalid_request_error", "'messages' or 'prompt' is required")
            return
        answer = Answer(path, request, prompt, self.flags)
        used, context = answer.used, self.flags.context // self.flags.slots
        if used >= context:
            text = f"request ({used} tokens) exceeds the available context size ({context} tokens)"
            await reply.error(400, "exceed_context_size_error", text, n_prompt_tokens=used, n_ctx=context)
            return
        task = asyncio.create_task(self.generate_in_slot(answer, reply))
        self.streams.add(task)
        gone = asyncio.create_task(reply.client_gone.wait())
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        left = gone.done()
        for item in (task, gone):
            item.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        self.streams.discard(task)
        if left or task.cancelled() or task.exception():
            raise ConnectionAbortedError

    async def generate_in_slot(self, answer: Answer, reply: Reply) -> None:
        async with self.free:
            slot = next(slot for slot in self.slots if not slot.busy)
            slot.busy, slot.decoded, slot.remaining = True, 0, answer.count
            try:
                await self.send_answer(answer, reply, slot)
            finally:
                slot.busy = False

    async def send_answer(self, answer: Answer, reply: Reply, slot: Slot) -> None:
        if answer.stream:
            await reply.start_stream()
        await asyncio.sleep(self.flags.number("prompt_s", 0))
        if answer.stream and answer.chat:
            await reply.event(answer.frame({"role": "assistant", "content": None}))
        rate = self.flags.number("rate", 0)
        begin = asyncio.get_running_loop().time()
        for number in range(answer.count):
            await self.fault(number, reply)
            if self.stopping.is_set():
                await reply.client_gone.wait()
            due = begin + number / rate if rate else 0
            await asyncio.sleep(max(0, due - asyncio.get_running_loop().time()))
            computed_s = time.process_time() + self.flags.number("computes_s", 0)
            while time.process_time() < computed_s:
                pass
            self.decodes += 1
            slot.decoded, slot.remaining = number + 1, answer.count - number - 1
            if answer.stream:
                await reply.event(answer.token(number))
        self.predicted += answer.count
        self.predicted_s += asyncio.get_running_loop().time() - begin
        await self.fault(answer.count, reply)
        if answer.stream:
            await reply.end_stream(answer.endings(), done=answer.path != "/completion")
        else:
            await reply.json(200, answer.whole())

    async def fault(self, sent: int, reply: Reply) -> None:
        if sent == self.flags.number("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if sent == self.flags.number("hang_after"):
            await asyncio.Event().wait()
        if sent == self.flags.number("cut_after"):
            raise ConnectionAbortedError
        if sent == self.flags.number("error_after"):
            await reply.event({"error": {"code": 500, "message": "Compute error.", "type": "server_error"}})
            raise ConnectionAbortedError


def die(flags: Flags) -> None:
    log(flags.knobs.get("die", "fake death").replace("_", " "))
    status = int(flags.number("exit", 1))
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> int:
    flags = parse(sys.argv[1:])
    if flags.number("ignore_term", 0):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = b"flood " * 20 + b"\n"
    for _ in range(int(flags.number("flood", 0)) // len(line)):
        os.write(2, line)
    if flags.number("grandchild", 0):
        child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
        log(f"grandchild pid={child.pid}")
    if "die" in flags.knobs and "die_at" not in flags.knobs:
        die(flags)
    return asyncio.run(Engine(flags).run())


if __name__ == "__main__":
    os._exit(main())
