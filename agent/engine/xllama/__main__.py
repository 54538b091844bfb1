"""Serves llama-server's HTTP API from the xllamacpp wheel, and behaves towards its supervisor as llama-server does.

It is llama.cpp's own server, linked into the wheel: unix sockets, progress lines and log lines come from there. Missing
around it are what llama-server's main() does: flags, signals, exit statuses, and its standard input.
"""

import os
import signal
import sys
import threading
from typing import Any, NamedTuple

import xllamacpp

from agent.engine.xllama import flags

_EXIT_COMMAND = b"cmd_router_to_child:exit"
_CHILD_MODE = "LLAMA_SERVER_ROUTER_PORT"
_MIB = 1 << 20


def main(argv: list[str]) -> int:
    """Exit status as llama-server's: 0 after a stop, 1 when it cannot serve."""
    given = flags.parse(argv)
    if given.VERSION:
        info = xllamacpp.BUILD_INFO
        sys.stderr.write(f"version: xllamacpp {xllamacpp.__version__} (build {info['build_number']})\n")
        return 0
    # The wheel initialises every device to describe it, so this is asked only when needed.
    offloadable = tuple(_offloadable()) if given.LIST_DEVICES or "DEVICES" in given or "SPLIT" in given else ()
    if given.LIST_DEVICES:
        lines = [_describe(device) for device in offloadable] or ["  (none)"]
        sys.stdout.write("\n".join(["Available devices:", *lines, ""]))
        return 0
    params = xllamacpp.CommonParams()
    try:
        flags.fill(params, given, xllamacpp, tuple(device["name"] for device in offloadable))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return _serve(params)


def _offloadable() -> list[dict[str, Any]]:
    cpu = "GGML_BACKEND_DEVICE_TYPE_CPU"
    return [device for device in xllamacpp.get_device_info() if device["type"].name != cpu]


def _describe(device: dict[str, Any]) -> str:
    total, free = device["memory_total"] // _MIB, device["memory_free"] // _MIB
    return f"  {device['name']}: {device['description']} ({total} MiB, {free} MiB free)"


def _serve(params: Any) -> int:
    if key := os.environ.get("LLAMA_API_KEY"):
        params.api_keys = [*params.api_keys, key]
    inputs = _separate_inputs() if _CHILD_MODE in os.environ else None
    stop = threading.Event()
    try:
        server = xllamacpp.Server(params)  # until it returns, TERM ends the process at once, as with llama-server
    except RuntimeError:
        return 1  # the library has logged why
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if inputs is not None:
        threading.Thread(target=_watch, args=(inputs.ours, stop), name="standard input", daemon=True).start()
    stop.wait()
    # Ending waits for open streams. A second signal ends it at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if inputs is not None:
        os.write(inputs.to_library, _EXIT_COMMAND + b"\n")  # else its reading thread would never end
    del server
    return 0


class _Inputs(NamedTuple):
    ours: int
    to_library: int


def _separate_inputs() -> _Inputs:
    """Give the library a standard input of our making, and keep the real one.

    On the end of its input the library calls exit() from a thread of its own, in the middle of Python.
    """
    ours = os.dup(0)
    library, to_library = os.pipe()
    os.dup2(library, 0)
    os.close(library)
    return _Inputs(ours, to_library)


def _watch(ours: int, stop: threading.Event) -> None:
    """The supervisor's exit command stops us; the end of input means that it is gone, and ends us at once."""
    said = b""
    while chunk := os.read(ours, 4096):
        said = (said + chunk)[-4096:]
        if _EXIT_COMMAND in said:
            stop.set()
            return
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
