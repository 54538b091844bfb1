"""The command line of an engine. Pure, and the only place that knows llama.cpp's flags."""

from collections.abc import Mapping
from pathlib import Path

from sollol.errors import Reason, refuse
from sollol.report import CoordinatorPlan, DeviceShare

from agent.engine.environment import engine_environment

CPU = "CPU"

# What a child in router mode takes on its standard input as a request to end.
EXIT_LINE = b"cmd_router_to_child:exit\n"


def coordinator_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a coordinator: from scratch, and with progress lines on standard output.

    llama-server takes the mere presence of this variable for "a router started me". It then prints load progress, and
    ends when its standard input does.
    """
    return engine_environment(base) | {"LLAMA_SERVER_ROUTER_PORT": "1"}


def coordinator_argv(
    prefix: tuple[str, ...],
    plan: CoordinatorPlan,
    *,
    model_path: Path,
    socket_path: Path,
    gpu_devices: tuple[str, ...],
    threads: int,
) -> tuple[str, ...]:
    """Return the whole command line of a coordinator.

    Args:
        prefix: How to run llama-server here, such as `("/usr/bin/llama-server",)`.
        plan: What to run; its layers are placed exactly, the engine's own fitting is off.
        model_path: The (first) GGUF file.
        socket_path: Must end in ".sock" and have at most 107 bytes; must not exist when the engine starts.
        gpu_devices: The engine's names of its GPUs, in the engine's order.
        threads: Used when the plan does not say; 0 leaves the choice to the engine.

    Raises:
        SollolError: INVALID_REQUEST when the plan names a device that is not here, no layers, or no room for a token.
    """
    _check(plan, gpu_devices)
    return (
        *prefix,
        *("--host", str(socket_path)),
        *("-m", str(model_path)),
        *("--alias", plan.model),
        "--offline",  # never fetch anything
        "--no-ui",
        *("-fit", "off"),  # placement is ours: an engine that moved layers by itself would break reservations
        *_placement(plan.shares, gpu_devices),
        *("-c", str(plan.context_per_slot * plan.parallel)),
        *("-np", str(plan.parallel)),
        "--no-kv-unified",  # each slot has its own share of -c, as the memory model counts it
        *("-b", str(plan.batch)),
        *("-ub", str(plan.ubatch)),
        *_threads(plan.threads or threads),
        *("-ctk", plan.kv_type),
        *("-ctv", plan.kv_type),
        *("--cache-ram", "0"),  # the engine's default would take 8 GiB that nobody reserved
        "--jinja",
        "--metrics",
        "--slots",
        # The default lets any web page use the engine; harmless on a unix socket, wrong everywhere else.
        *("--cors-origins", "localhost"),
        "--no-cors-credentials",
        *("-lv", "4"),  # the level that logs buffer sizes
        *("--log-colors", "off"),
    )


def _check(plan: CoordinatorPlan, gpu_devices: tuple[str, ...]) -> None:
    unknown = [share.device_id for share in plan.shares if share.device_id not in (CPU, *gpu_devices)]
    if unknown:
        here = ", ".join((CPU, *gpu_devices))
        raise refuse(Reason.INVALID_REQUEST, f"the plan puts layers on {', '.join(unknown)}; this engine has {here}")
    if sum(share.layers for share in plan.shares) < 1:
        raise refuse(Reason.INVALID_REQUEST, "the plan puts no layer on any device")
    if plan.parallel < 1 or plan.context_per_slot < 1:
        raise refuse(
            Reason.INVALID_REQUEST,
            "the plan leaves no room for a token: parallel and context_per_slot must be at least 1",
            numbers={"parallel": plan.parallel, "context_per_slot": plan.context_per_slot},
        )


def _placement(shares: tuple[DeviceShare, ...], gpu_devices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flags that put exactly `layers` whole layers on each device.

    The engine offloads the last `-ngl` layers, the output layer included, and deals them to `--device` in order in the
    proportions of `-ts`. Proportions that add up to `-ngl` give each device just its number. The front layers and the
    embeddings stay on the CPU.
    """
    on_gpu = {share.device_id: share.layers for share in shares if share.device_id != CPU and share.layers}
    names = [name for name in gpu_devices if name in on_gpu]
    if not names:
        return ("-ngl", "0", "--device", "none")
    flags = ("-ngl", str(sum(on_gpu.values())), "--device", ",".join(names))
    if len(names) == 1:
        return flags
    return (*flags, "-ts", ",".join(str(on_gpu[name]) for name in names))


def _threads(threads: int) -> tuple[str, ...]:
    return ("-t", str(threads)) if threads > 0 else ()
