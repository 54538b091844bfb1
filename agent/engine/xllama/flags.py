"""Understands the llama-server flags that we use, and sets them in the wheel's parameters.

Whatever else is given ends in an error, as it would with llama-server: a flag that is quietly ignored would break what
placement reserved.
"""

import argparse
import sys
from typing import Any, NoReturn

_SPLIT_LENGTH = 128  # the wheel takes a tensor split of exactly this many numbers

Enums = dict[str, Any]


class _Parser(argparse.ArgumentParser):
    """Complains as llama-server does: one line on standard error, exit status 1."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(1)


def _switch(text: str) -> bool:
    if text in ("on", "off"):
        return text == "on"
    raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")


def _layers(text: str) -> int:
    return {"auto": -1, "all": -2}[text] if text in ("auto", "all") else int(text)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return text.split(",")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read llama-server flags. Every destination but the upper-case ones is a field of the wheel's `CommonParams`."""
    parser = _Parser(prog="llama-server", allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--version", action="store_true", dest="VERSION", default=False)
    add("--list-devices", action="store_true", dest="LIST_DEVICES", default=False)
    add("-m", "--model", dest="MODEL", default="")
    add("-a", "--alias", type=_names, dest="ALIAS")
    add("--host", type=_names, dest="hostnames")
    add("-dev", "--device", type=_names, dest="DEVICES")
    add("-t", "--threads", type=int, dest="THREADS", default=-1)
    add("-tb", "--threads-batch", type=int, dest="THREADS_BATCH", default=-1)
    add("-ts", "--tensor-split", type=_numbers, dest="SPLIT")
    add("-ctk", "--cache-type-k", dest="TYPE_K")
    add("-ctv", "--cache-type-v", dest="TYPE_V")
    add("-fa", "--flash-attn", choices=("on", "off", "auto"), dest="FLASH")
    add("--log-colors", choices=("off", "auto"), dest="COLORS")  # the wheel never colours what is not a terminal
    add("--api-key", type=_names, dest="api_keys")
    add("-fit", "--fit", type=_switch, dest="fit_params")
    add("-ngl", "--gpu-layers", "--n-gpu-layers", type=_layers, dest="n_gpu_layers")
    _add_plain(parser)
    return parser.parse_args(argv)


def _add_plain(parser: argparse.ArgumentParser) -> None:
    """Add the flags whose value is a field of `CommonParams` as it is."""
    for names, field in (
        (("--port",), "port"),
        (("-c", "--ctx-size"), "n_ctx"),
        (("-np", "--parallel"), "n_parallel"),
        (("-b", "--batch-size"), "n_batch"),
        (("-ub", "--ubatch-size"), "n_ubatch"),
        (("-cram", "--cache-ram"), "cache_ram_mib"),
        (("-ctxcp", "--ctx-checkpoints", "--swa-checkpoints"), "n_ctx_checkpoints"),
        (("-lv", "--verbosity"), "verbosity"),
        (("--threads-http",), "n_threads_http"),
        (("--sse-ping-interval",), "sse_ping_interval"),
    ):
        parser.add_argument(*names, type=int, dest=field)
    parser.add_argument("--cors-origins", dest="cors_origins")
    for names, field in (
        (("--offline",), "offline"),
        (("--metrics",), "endpoint_metrics"),
        (("-kvu", "--kv-unified"), "kv_unified"),
        (("--slots",), "endpoint_slots"),
        (("--jinja",), "use_jinja"),
        (("--warmup",), "warmup"),
        (("--ui", "--webui"), "ui"),
        (("--cors-credentials",), "cors_credentials"),
    ):
        parser.add_argument(*names, action="store_const", const=True, dest=field)
    for names, field in (
        (("-no-kvu", "--no-kv-unified"), "kv_unified"),
        (("--no-slots",), "endpoint_slots"),
        (("--no-jinja",), "use_jinja"),
        (("--no-warmup",), "warmup"),
        (("--no-ui", "--no-webui"), "ui"),
        (("--no-cors-credentials",), "cors_credentials"),
    ):
        parser.add_argument(*names, action="store_const", const=False, dest=field)


def fill(params: Any, given: argparse.Namespace, wheel: Any, devices: tuple[str, ...]) -> None:
    """Set `given` in `params`, the wheel's `CommonParams`.

    `wheel` is its module, for the enumerations; `devices` are its names of what layers can be offloaded to, in order.

    Raises:
        ValueError: a value that llama-server would refuse too.
    """
    params.port = 8080
    for field, content in vars(given).items():
        if not field.isupper():
            setattr(params, field, content)
    params.model.path = given.MODEL
    params.cpuparams.n_threads = given.THREADS
    params.cpuparams_batch.n_threads = given.THREADS_BATCH if given.THREADS_BATCH > 0 else given.THREADS
    if "cors_origins" in given:
        params.cors_origins_explicit = True
    if "ALIAS" in given:
        params.model_alias = set(given.ALIAS)
    if "TYPE_K" in given:
        params.cache_type_k = _member(wheel.ggml_type, f"GGML_TYPE_{given.TYPE_K}")
    if "TYPE_V" in given:
        params.cache_type_v = _member(wheel.ggml_type, f"GGML_TYPE_{given.TYPE_V}")
    if "FLASH" in given:
        word = {"on": "enabled", "off": "disabled", "auto": "auto"}[given.FLASH]
        params.flash_attn_type = _member(wheel.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{word}")
    _place(params, given, devices)


def _place(params: Any, given: argparse.Namespace, devices: tuple[str, ...]) -> None:
    """The wheel cannot choose devices, but a share of zero keeps a device out just as well."""
    chosen = getattr(given, "DEVICES", list(devices))
    if chosen == ["none"]:
        params.n_gpu_layers = 0
        return
    if unknown := [name for name in chosen if name not in devices]:
        raise ValueError(f"invalid device: {unknown[0]}")
    if [name for name in devices if name in chosen] != chosen:
        raise ValueError("devices must be given in the order of --list-devices")
    shares = getattr(given, "SPLIT", None) or [1.0] * len(chosen)
    if len(shares) > len(chosen) and devices:
        raise ValueError(f"--tensor-split has {len(shares)} shares for {len(chosen)} devices")
    if len(chosen) < len(devices) or "SPLIT" in given:
        share_of = dict(zip(chosen, shares, strict=False))
        split = [share_of.get(name, 0.0) for name in devices]
        params.tensor_split = split + [0.0] * (_SPLIT_LENGTH - len(split))


def _member(enumeration: Any, name: str) -> Any:
    found = next((member for member in enumeration if member.name.lower() == name.lower()), None)
    if found is None:
        raise ValueError(f"unsupported value: {name.rpartition('_')[2]}")
    return found
