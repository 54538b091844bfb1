"""The command line of an engine. Pure, and the only place that knows llama.cpp's flags."""

from collections.abc import Mapping
from pathlib import Path

from sollol.errors import Reason, refuse
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare

from agent.engine.environment import engine_environment

CPU = "CPU"
CACHE_RAM_MIB = 0  # for the prompts of those who were served; the default would take 8 GiB that nobody reserved

# What a child in router mode takes on its standard input as a request to end.
EXIT_LINE = b"cmd_router_to_child:exit\n"


def coordinator_environment(base: Mapping[str, str], *, key: str = "") -> dict[str, str]:
    """Return the environment of a coordinator: from scratch, and with progress lines on standard output.

    A key is asked of everybody, on the unix socket too. It is here because anybody can read a command line.

    llama-server takes the mere presence of this variable for "a router started me". It then prints load progress, and
    ends when its standard input does.
    """
    return engine_environment(base) | {"LLAMA_SERVER_ROUTER_PORT": "1"} | ({"LLAMA_API_KEY": key} if key else {})


def coordinator_argv(
    prefix: tuple[str, ...],
    plan: CoordinatorPlan,
    *,
    model_path: Path,
    socket_path: Path,
    gpu_devices: tuple[str, ...],
    threads: int,
    node_id: str = "",
    listen: str = "",
    port: int = 0,
) -> tuple[str, ...]:
    """Return the whole command line of a coordinator.

    Args:
        prefix: How to run llama-server here, such as `("/usr/bin/llama-server",)`.
        plan: What to run; its layers are placed exactly, the engine's own fitting is off.
        model_path: The (first) GGUF file.
        socket_path: Must end in ".sock" and have at most 107 bytes; must not exist when the engine starts.
        gpu_devices: The engine's names of its GPUs, in the engine's order.
        threads: Used when the plan does not say; 0 leaves the choice to the engine. With backends it is one thread in
            any case: our own CPU holds no layer then, and threads that wait spin, and take the cores from a backend
            beside us (one with two threads on two cores took 24 to 70 ms a token beside two threads, 3 to 12 beside
            one).
        node_id: Our own node, where shares without a node are.
        listen: The address to listen on beside the socket.
        port: There; 0: on the socket only.

    Raises:
        SollolError: INVALID_REQUEST when the plan names a device that is not here, no layers, or no room for a token.
    """
    _check(plan)
    placement = _over_backends(plan, gpu_devices, node_id) if plan.backends else _placement(plan.shares, gpu_devices)
    return (
        *prefix,
        *(("--host", f"{socket_path},{listen}", "--port", str(port)) if port else ("--host", str(socket_path))),
        *("-m", str(model_path)),
        *("--alias", plan.model),
        "--offline",  # never fetch anything
        "--no-ui",
        *("-fit", "off"),  # placement is ours: an engine that moved layers by itself would break reservations
        *placement,
        *("-c", str(plan.context_per_slot * plan.parallel)),
        *("-np", str(plan.parallel)),
        "--no-kv-unified",  # each slot has its own share of -c, as the memory model counts it
        *("-b", str(plan.batch)),
        *("-ub", str(plan.ubatch)),
        *_threads(1 if plan.backends else plan.threads or threads),
        *("-ctk", plan.kv_type),
        *("-ctv", plan.kv_type),
        *("--cache-ram", str(CACHE_RAM_MIB), "--ctx-checkpoints", "0"),  # those too would take gigabytes
        "--jinja",
        "--metrics",
        "--slots",
        # The default lets any web page use the engine; harmless on a unix socket, wrong everywhere else.
        *("--cors-origins", "localhost"),
        "--no-cors-credentials",
        *("-lv", "4"),  # the level that logs buffer sizes
        *("--log-colors", "off"),
    )


def backend_argv(program: Path, *, host: str, port: int, devices: tuple[str, ...], threads: int) -> tuple[str, ...]:
    """Return the whole command line of a backend.

    Args:
        program: The ggml-rpc-server.
        host: A numeric IPv4 address: the program takes no other.
        port: A taken one makes it end with status 0.
        devices: The engine's names of what it lends, in this order.
        threads: 0 leaves the choice to the engine.
    """
    return (str(program), "-H", host, "-p", str(port), *_threads(threads), "-d", ",".join(devices))


def _check(plan: CoordinatorPlan) -> None:
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
    unknown = [share.device_id for share in shares if share.device_id not in (CPU, *gpu_devices)]
    if unknown:
        here = ", ".join((CPU, *gpu_devices))
        raise refuse(Reason.INVALID_REQUEST, f"the plan puts layers on {', '.join(unknown)}; this engine has {here}")
    on_gpu = {share.device_id: share.layers for share in shares if share.device_id != CPU and share.layers}
    names = [name for name in gpu_devices if name in on_gpu]
    if not names:
        return ("-ngl", "0", "--device", "none")
    flags = ("-ngl", str(sum(on_gpu.values())), "--device", ",".join(names))
    if len(names) == 1:
        return flags
    return (*flags, "-ts", ",".join(str(on_gpu[name]) for name in names))


def _over_backends(plan: CoordinatorPlan, gpu_devices: tuple[str, ...], node_id: str) -> tuple[str, ...]:
    """Return the flags that put whole layers on backends' and our own GPUs' devices, in the order of the plan.

    `--device` names them in that order and must come after `--rpc`, which makes the backends' names known. All layers
    are offloaded: what were left would land on our own CPU, which holds layers only through a backend.
    """
    names = _names_over_rpc(plan.backends, node_id)
    placed: list[tuple[str, int]] = []
    for share in plan.shares:
        if not share.layers:
            continue
        node = share.node_id or node_id
        name = names.get((node, share.device_id))
        if name is None and node == node_id and share.device_id in gpu_devices:
            name = share.device_id
        if name is None:
            where = f"{share.device_id} of {node or 'this node'}"
            message = f"the plan puts layers on {where}, which is neither lent by a backend of it nor a GPU here"
            raise refuse(Reason.INVALID_REQUEST, message)
        placed.append((name, share.layers))
    return (
        *("--rpc", ",".join(f"{backend.host}:{backend.port}" for backend in plan.backends)),
        *("--device", ",".join(name for name, _ in placed)),
        *("-ngl", str(sum(layers for _, layers in placed))),
        *("-ts", ",".join(str(layers) for _, layers in placed)),
    )


def _names_over_rpc(backends: tuple[BackendEndpoint, ...], node_id: str) -> dict[tuple[str, str], str]:
    """Return the engine's name of each lent device by (node, device): numbered through, in the order of `--rpc`."""
    lent = [(backend.node_id or node_id, device_id) for backend in backends for device_id in backend.device_ids]
    if len(set(lent)) != len(lent):
        raise refuse(Reason.INVALID_REQUEST, "the plan's backends lend a device twice")
    return {device: f"RPC{number}" for number, device in enumerate(lent)}


def _threads(threads: int) -> tuple[str, ...]:
    return ("-t", str(threads)) if threads > 0 else ()
