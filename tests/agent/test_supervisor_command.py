import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sollol.errors import Reason, SollolError
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare

from agent.supervisor.command import backend_argv, coordinator_argv, coordinator_environment

GPUS = ("CUDA0", "CUDA1", "Vulkan0")


def argv_of(
    gpu_devices: tuple[str, ...] = GPUS, *, node_threads: int = 3, listen: str = "", port: int = 0, **plan: object
) -> list[str]:
    fields = {"model": "llama:8b", "parallel": 4, "context_per_slot": 1024, "shares": shares(CPU=33)} | plan
    return list(
        coordinator_argv(
            ("/opt/llama-server", "--verbose"),
            CoordinatorPlan(**fields),
            model_path=Path("/models/m.gguf"),
            socket_path=Path("/run/x.sock"),
            gpu_devices=gpu_devices,
            threads=node_threads,
            node_id="here",
            listen=listen,
            port=port,
        )
    )


def shares(**layers: int) -> tuple[DeviceShare, ...]:
    return tuple(DeviceShare(device_id=name, layers=count) for name, count in layers.items())


def value(argv: list[str], flag: str) -> str:
    assert argv.count(flag) == 1, flag
    return argv[argv.index(flag) + 1]


def test_it_starts_with_the_prefix_and_names_model_socket_and_alias() -> None:
    argv = argv_of()
    assert argv[:2] == ["/opt/llama-server", "--verbose"]
    assert value(argv, "-m") == "/models/m.gguf"
    assert value(argv, "--host") == "/run/x.sock"
    assert value(argv, "--alias") == "llama:8b"


def test_it_listens_on_a_port_beside_its_socket_only_when_told_to() -> None:
    assert "--port" not in argv_of()
    argv = argv_of(listen="192.168.1.20", port=18_080)
    assert (value(argv, "--host"), value(argv, "--port")) == ("/run/x.sock,192.168.1.20", "18080")
    assert value(argv, "--cors-origins") == "localhost"


def test_each_slot_gets_the_whole_context_of_the_plan() -> None:
    argv = argv_of(parallel=4, context_per_slot=1024)
    assert (value(argv, "-c"), value(argv, "-np")) == ("4096", "4")
    assert "--no-kv-unified" in argv


def test_without_a_gpu_share_nothing_is_offloaded() -> None:
    for plan in (shares(CPU=33), shares(CPU=33, CUDA0=0)):
        argv = argv_of(shares=plan)
        assert (value(argv, "-ngl"), value(argv, "--device")) == ("0", "none")
        assert "-ts" not in argv


def test_one_gpu_takes_the_last_layers() -> None:
    argv = argv_of(shares=shares(CPU=10, CUDA0=23))
    assert (value(argv, "-ngl"), value(argv, "--device")) == ("23", "CUDA0")
    assert "-ts" not in argv


def test_several_gpus_get_whole_layers_in_the_order_of_the_engine() -> None:
    argv = argv_of(shares=shares(CPU=3, Vulkan0=10, CUDA0=20))
    assert (value(argv, "-ngl"), value(argv, "--device"), value(argv, "-ts")) == ("30", "CUDA0,Vulkan0", "20,10")


@given(cpu=st.integers(0, 100), gpus=st.lists(st.integers(0, 100), min_size=3, max_size=3))
def test_the_engine_deals_layers_as_planned(cpu: int, gpus: list[int]) -> None:
    """The engine's own rule: the last -ngl layers, dealt to the first device whose cumulative share exceeds theirs."""
    if not cpu + sum(gpus):
        return
    argv = argv_of(shares=shares(CPU=cpu, **dict(zip(GPUS, gpus, strict=True))))
    offloaded = int(value(argv, "-ngl"))
    names = value(argv, "--device").split(",")
    portions = [int(part) for part in value(argv, "-ts").split(",")] if "-ts" in argv else [1]
    edges = [sum(portions[: place + 1]) / sum(portions) for place in range(len(portions))]
    dealt = dict.fromkeys(GPUS, 0)
    for layer in range(offloaded):
        dealt[names[next(place for place, edge in enumerate(edges) if edge > layer / offloaded)]] += 1
    assert list(dealt.values()) == gpus


def lent(node_id: str, *device_ids: str, port: int = 7500) -> BackendEndpoint:
    return BackendEndpoint(node_id=node_id, host=f"{node_id}.lan", port=port, device_ids=device_ids)


def on(node_id: str, **layers: int) -> tuple[DeviceShare, ...]:
    return tuple(DeviceShare(device_id=name, layers=count, node_id=node_id) for name, count in layers.items())


def test_backends_get_whole_layers_in_the_order_of_the_plan_under_the_engines_names() -> None:
    """Devices are numbered through over the endpoints, whatever is used of them and in whatever order."""
    argv = argv_of(
        shares=(*shares(CPU=0), *on("b", CUDA1=7), *shares(CUDA0=20), *on("a", CPU=6), *on("b", CUDA0=0)),
        backends=(lent("a", "CPU"), lent("b", "CUDA0", "CUDA1", port=7501)),
    )
    assert value(argv, "--rpc") == "a.lan:7500,b.lan:7501"
    assert (value(argv, "--device"), value(argv, "-ts")) == ("RPC2,CUDA0,RPC0", "7,20,6")
    assert value(argv, "-ngl") == "33"
    assert argv.index("--rpc") < argv.index("--device")


@pytest.mark.parametrize("named", ["", "here"])
def test_the_coordinators_own_node_may_lend_its_cpu_too(named: str) -> None:
    argv = argv_of(
        shares=(*shares(CPU=0), *on(named, CPU=21), *on("b", CPU=12)), backends=(lent("here", "CPU"), lent("b", "CPU"))
    )
    assert (value(argv, "--device"), value(argv, "-ts")) == ("RPC0,RPC1", "21,12")


def test_a_single_backend_may_hold_everything() -> None:
    argv = argv_of(shares=(*shares(CPU=0), *on("b", CPU=127)), backends=(lent("b", "CPU"),))
    assert (value(argv, "--device"), value(argv, "-ts"), value(argv, "-ngl")) == ("RPC0", "127", "127")


@pytest.mark.parametrize(
    "bad",
    [
        {"shares": (*shares(CPU=3), *on("b", CPU=30))},
        {"shares": (*shares(CPU=0), *on("c", CPU=33))},
        {"shares": (*shares(CPU=0), *on("b", CUDA0=33))},
        {"shares": (*shares(CPU=0), *on("b", CPU=30), *shares(ROCm7=3))},
        {"shares": on("b", CPU=0)},
        {"shares": on("b", CPU=33), "backends": (lent("b", "CPU"), lent("b", "CPU", port=7501))},
    ],
)
def test_layers_where_nobody_can_hold_them_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SollolError) as refused:
        argv_of(**({"backends": (lent("b", "CPU"),)} | bad))
    assert refused.value.refusal.reason is Reason.INVALID_REQUEST


def test_a_backend_listens_where_it_is_told_and_lends_just_the_devices_named() -> None:
    argv = backend_argv(Path("/opt/rpc"), host="127.0.0.1", port=7500, devices=("CUDA0", "CPU"), threads=3)
    assert argv == ("/opt/rpc", "-H", "127.0.0.1", "-p", "7500", "-t", "3", "-d", "CUDA0,CPU")


def test_the_threads_of_the_plan_win_over_those_of_the_node() -> None:
    assert value(argv_of(node_threads=3), "-t") == "3"
    assert value(argv_of(node_threads=3, threads=8), "-t") == "8"


def test_a_coordinator_whose_layers_are_all_on_backends_takes_one_thread() -> None:
    split = {"shares": (*shares(CPU=0), *on("b", CPU=33)), "backends": (lent("b", "CPU"),)}
    assert value(argv_of(node_threads=3, **split), "-t") == "1"
    assert value(argv_of(threads=8, **split), "-t") == "1"


def test_without_any_number_of_threads_the_engine_chooses() -> None:
    assert "-t" not in argv_of(node_threads=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"shares": shares(CPU=1, ROCm7=2)},
        {"shares": ()},
        {"shares": shares(CPU=0)},
        {"parallel": 0},
        {"context_per_slot": 0},
    ],
)
def test_a_plan_that_cannot_run_here_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SollolError) as refused:
        argv_of(**bad)
    assert refused.value.refusal.reason is Reason.INVALID_REQUEST


def test_nothing_of_our_environment_configures_the_engine() -> None:
    ours = {"PATH": "/bin", "LLAMA_ARG_TOOLS": "all", "HF_TOKEN": "secret", "LLAMA_SERVER_CHILD_MODE": "download"}
    environment = coordinator_environment(ours)
    assert environment.keys().isdisjoint(ours.keys() - {"PATH"})
    assert environment["LLAMA_SERVER_ROUTER_PORT"] == "1"


def test_a_key_is_in_the_environment_and_in_no_command_line() -> None:
    assert coordinator_environment({}, key="secret-key")["LLAMA_API_KEY"] == "secret-key"
    assert "LLAMA_API_KEY" not in coordinator_environment({"LLAMA_API_KEY": "ours"})


@pytest.mark.engine
def test_the_engine_knows_every_flag(engine_binary: Path) -> None:
    """`--help` lists them; an unknown one would make every start fail."""
    text = subprocess.run([engine_binary, "--help"], capture_output=True, text=True, check=True, timeout=20).stdout
    known = set(text.replace(",", " ").split())
    argv = argv_of(shares=shares(CPU=3, CUDA0=20, CUDA1=10), listen="127.0.0.1", port=18_080)[2:]
    split = argv_of(shares=on("b", CPU=9), backends=(lent("b", "CPU"),))[2:]
    flags = [word for word in (*argv, *split) if word.startswith("-")]
    assert len(flags) > 20
    assert [flag for flag in flags if flag not in known] == []
