import sys
from pathlib import Path

import pytest
import structlog
from sollol.engine import EngineSource
from sollol.errors import Reason, SollolError

from agent.engine.built import LLAMA_CPP, build_home
from agent.engine.find import find_engine
from tests.fakes.engine_source import write_program

FAKE = """\
#!/bin/sh
case "$*" in
    --version) echo "version: {name} (build 1)" >&2 ;;
    --list-devices) printf 'Available devices:\\n  CUDA0: Card (8000 MiB, 7000 MiB free)\\n' ;;
    *) echo "error: RPC not supported in this build" >&2; exit 1 ;;
esac
"""


def fake_engine(path: Path, name: str) -> Path:
    return write_program(path, FAKE.format(name=name))


@pytest.fixture
def machine(tmp_path):
    """A PATH and a cache of its own; the wheel is the real one."""
    return {"search_path": f"{tmp_path / 'bin'}:/usr/bin:/bin", "cache_dir": tmp_path / "cache"}


def engine_in(machine, place: str) -> Path:
    if place == "PATH":
        return Path(machine["search_path"].split(":")[0]) / "llama-server"
    return build_home(machine["cache_dir"], LLAMA_CPP) / "bin" / "llama-server"


async def test_the_configured_engine_wins_over_path(machine, tmp_path):
    fake_engine(engine_in(machine, "PATH"), "on path")
    mine = fake_engine(tmp_path / "my engine", "mine")

    found = await find_engine(mine, **machine)

    assert found is not None
    assert (found.engine.source, found.engine.path) == (EngineSource.CONFIGURED, str(mine))
    assert found.engine.build == "mine (build 1)"
    assert found.argv == (str(mine),)
    assert [device.device_id for device in found.devices] == ["CUDA0"]
    assert (found.engine.rpc, found.engine.rpc_protocol) == (False, "")


async def test_path_wins_over_what_was_built(machine):
    on_path = fake_engine(engine_in(machine, "PATH"), "on path")
    fake_engine(engine_in(machine, "BUILT"), "built")
    found = await find_engine(None, **machine)
    assert found is not None
    assert (found.engine.source, found.engine.path) == (EngineSource.PATH, str(on_path))


async def test_what_was_built_wins_over_the_wheel(machine):
    built = fake_engine(engine_in(machine, "BUILT"), "built")
    found = await find_engine(None, **machine)
    assert found is not None
    assert (found.engine.source, found.engine.path) == (EngineSource.BUILT, str(built))


async def test_without_any_binary_the_wheel_serves_and_stays_out_of_our_process(machine):
    found = await find_engine(None, **machine)
    assert found is not None
    assert found.engine.source is EngineSource.XLLAMACPP
    assert found.argv == (sys.executable, "-P", "-m", "agent.engine.xllama")
    assert found.engine.build.startswith("xllamacpp ")
    assert not found.engine.rpc
    assert found.rpc_server is None
    assert "xllamacpp" not in sys.modules


async def test_a_machine_with_nothing_has_no_engine(machine, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert await find_engine(None, **machine) is None


async def test_a_broken_engine_on_path_is_passed_over_and_said_so(machine):
    write_program(engine_in(machine, "PATH"), "#!/bin/sh\necho 'libcuda.so.1: cannot open' >&2; exit 127\n")
    fake_engine(engine_in(machine, "BUILT"), "built")
    with structlog.testing.capture_logs() as logs:
        found = await find_engine(None, **machine)
    assert found is not None
    assert found.engine.source is EngineSource.BUILT
    assert [(line["event"], line["why"]) for line in logs] == [
        ("engine_unusable", "exit status 127: libcuda.so.1: cannot open")
    ]


@pytest.mark.parametrize(
    ("text", "mode", "why"),
    [
        (None, 0, "is not there"),
        ("hello", 0o644, "is not an executable file"),
        ("#!/bin/sh\necho broken >&2\nexit 1\n", 0o755, "exit status 1: broken"),
        ("#!/no/such/shell\n", 0o755, "cannot be run"),
    ],
)
async def test_a_configured_engine_that_cannot_serve_is_an_error_and_never_replaced(machine, tmp_path, text, mode, why):
    fake_engine(engine_in(machine, "PATH"), "on path")
    mine = tmp_path / "mine"
    if text is not None:
        mine.write_text(text)
        mine.chmod(mode)
    with pytest.raises(SollolError) as caught:
        await find_engine(mine, **machine)
    refusal = caught.value.refusal
    assert refusal.reason is Reason.ENGINE_MISSING
    assert str(mine) in refusal.message
    assert why in refusal.message


async def test_a_directory_is_no_engine(machine, tmp_path):
    with pytest.raises(SollolError, match="is not an executable file"):
        await find_engine(tmp_path, **machine)


@pytest.mark.parametrize("name", ["ggml-rpc-server", "rpc-server"])
async def test_the_backend_program_is_found_beside_the_engine_under_both_names(machine, tmp_path, name):
    mine = fake_engine(tmp_path / "llama-server", "mine")
    beside = write_program(tmp_path / name)
    found = await find_engine(mine, **machine)
    assert found is not None
    assert found.rpc_server == beside


async def test_the_backend_program_is_found_behind_a_link(machine, tmp_path):
    beside = write_program(tmp_path / "real" / "ggml-rpc-server")
    link = tmp_path / "llama-server"
    link.symlink_to(fake_engine(tmp_path / "real" / "llama-server", "mine"))
    found = await find_engine(link, **machine)
    assert found is not None
    assert found.rpc_server == beside
    assert found.engine.path == str(link)


async def test_the_engine_sees_which_gpus_are_visible_and_none_of_our_settings(machine, tmp_path):
    seen = tmp_path / "seen"
    mine = write_program(tmp_path / "mine", f"#!/bin/sh\nenv >{seen}\n")
    environ = {"CUDA_VISIBLE_DEVICES": "1", "LLAMA_ARG_TOOLS": "all", "HOME": "/h"}
    await find_engine(mine, **machine, environ=environ)
    lines = set(seen.read_text().splitlines())
    assert {"CUDA_VISIBLE_DEVICES=1", "HOME=/h", f"PATH={machine['search_path']}"} <= lines
    assert not any(line.startswith("LLAMA_") for line in lines)


@pytest.mark.engine
async def test_the_real_engine_is_known_by_its_build_and_its_rpc_protocol(machine, engine_binary):
    found = await find_engine(engine_binary, **machine)
    assert found is not None
    assert found.engine.rpc
    assert found.engine.rpc_protocol == "7.0"
    assert "build 336" in found.engine.build
    assert found.rpc_server == engine_binary.with_name("ggml-rpc-server")
