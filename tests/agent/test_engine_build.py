"""Building an engine: pip is real, its source archive and the compiler are not."""

import asyncio
import fcntl
import os
import tarfile
from pathlib import Path

import psutil
import pytest
from sollol.errors import Reason, Retry, SollolError

from agent.engine.build import BuildProgress, build_engine
from agent.engine.built import LLAMA_CPP, build_home, built_engine
from tests.fakes.engine_source import build_environment, write_archive, write_program
from tests.waiting import wait_until


class Bench:
    """One machine to build on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self.environment = build_environment(folder)
        self.spec = write_archive(folder)
        self.heard: list[BuildProgress] = []

    async def build(self, **more: str) -> Path:
        return await build_engine(
            self.cache,
            jobs=3,
            on_progress=self.heard.append,
            environment={**self.environment, **more},
            spec=self.spec,
        )

    @property
    def work(self) -> Path:
        home = build_home(self.cache, self.spec)
        return home.with_name(f"{home.name}.building")

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


async def refused(building) -> SollolError:
    with pytest.raises(SollolError) as caught:
        await building
    assert caught.value.refusal.reason is Reason.ENGINE_MISSING
    return caught.value


async def test_a_build_leaves_the_programs_and_nothing_else(bench):
    assert built_engine(bench.cache, bench.spec) is None

    path = await bench.build()

    assert path == built_engine(bench.cache, bench.spec)
    assert sorted(item.name for item in path.parent.iterdir()) == ["ggml-rpc-server", "llama-server"]
    assert all(os.access(item, os.X_OK) for item in path.parent.iterdir())
    assert not bench.work.exists()
    assert [item.stage for item in bench.heard] == [
        "fetching",
        "unpacking",
        "configuring",
        "compiling",
        "compiling",
        "installing",
    ]
    assert bench.heard[-2] == BuildProgress("compiling", 2, 2)


async def test_cmake_gets_the_flags_and_ninja_the_targets_and_jobs(bench):
    await bench.build()
    assert "-DTINY=ON" in bench.calls
    assert bench.calls[-1].endswith("-j 3 llama-server ggml-rpc-server")


async def test_what_is_built_already_is_returned_without_building(bench):
    first = await bench.build()
    bench.heard.clear()
    assert await bench.build() == first
    assert bench.heard == []


async def test_a_source_with_another_checksum_is_refused_before_its_code_runs_and_not_kept(bench):
    spec = bench.spec
    bench.spec = type(spec)(**{name: getattr(spec, name) for name in spec.__struct_fields__} | {"sha256": "0" * 64})
    error = await refused(bench.build())
    assert "refused and removed" in error.refusal.message
    assert not (bench.work / "download").exists()
    assert "unpacking" not in [item.stage for item in bench.heard]


async def test_a_source_that_cannot_be_had_says_what_pip_said(bench):
    (bench.folder / "tiny_engine-1.0.tar.gz").unlink()
    error = await refused(bench.build())
    assert "-m pip" in error.refusal.message
    assert any("tiny-engine==1.0" in line for line in error.refusal.log_lines)


async def test_a_machine_without_a_compiler_is_told_what_to_install(bench):
    (bench.folder / "tools" / "c++").unlink()
    error = await refused(bench.build(PATH=str(bench.folder / "tools")))
    assert "C++" in error.refusal.message
    assert "apt install g++ make" in error.refusal.message
    assert bench.heard == []


async def test_the_users_own_compiler_is_the_one_that_must_be_there(bench):
    error = await refused(bench.build(CXX="zig c++"))
    assert "zig" in error.refusal.message


async def test_a_failed_build_shows_the_last_lines_and_names_the_log(bench):
    error = await refused(bench.build(NINJA_FAILS="1"))
    assert error.refusal.log_lines == tuple(f"error line {i}" for i in range(11, 41))
    assert str(bench.work / "build.log") in error.refusal.message
    assert "error line 1\n" in (bench.work / "build.log").read_text()
    assert built_engine(bench.cache, bench.spec) is None


async def test_a_program_that_does_not_run_is_not_installed(bench):
    write_program(
        bench.folder / "tools" / "ninja",
        '#!/bin/sh\ncd "$2"; cp /bin/false bin/llama-server; cp /bin/false bin/ggml-rpc-server\n',
    )
    error = await refused(bench.build())
    assert "does not run" in error.refusal.message
    assert built_engine(bench.cache, bench.spec) is None


async def test_an_interrupted_build_ends_its_compiler_and_the_next_one_goes_on_from_there(bench):
    """It shall neither download nor unpack nor compile again what was done."""
    hanging = bench.folder / "pid"
    building = asyncio.create_task(bench.build(NINJA_HANGS=str(hanging)))
    await wait_until(hanging.exists, within_s=30, what="the compiler runs")
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert not psutil.pid_exists(int(hanging.read_text()))
    assert built_engine(bench.cache, bench.spec) is None

    (bench.folder / "tiny_engine-1.0.tar.gz").unlink()
    (bench.work / "objects" / "half-done").touch()
    (bench.work / "source" / "unpacked-once").touch()
    home = build_home(bench.cache, bench.spec)
    kept: list[bool] = []

    def watch(progress: BuildProgress) -> None:
        if progress.stage == "installing":
            kept.extend((bench.work / name).exists() for name in ("objects/half-done", "source/unpacked-once"))

    await build_engine(bench.cache, jobs=1, on_progress=watch, environment=bench.environment, spec=bench.spec)
    assert kept == [True, True]
    assert (home / "bin" / "llama-server").exists()


async def test_two_builds_of_the_same_do_not_collide(bench):
    home = build_home(bench.cache, bench.spec)
    home.parent.mkdir(parents=True)
    with home.with_name(f"{home.name}.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = await refused(bench.build())
    assert error.refusal.retry is Retry.RETRYABLE
    assert "another build" in error.refusal.message
    await bench.build()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tiny_engine-1.0/vendor/engine/../../../../out", tarfile.REGTYPE),
        ("tiny_engine-1.0/vendor/engine/link", tarfile.SYMTYPE),
        ("tiny_engine-1.0/vendor/engine/device", tarfile.CHRTYPE),
    ],
)
async def test_an_archive_that_reaches_outside_is_not_unpacked(tmp_path, name, kind):
    from agent.engine.source import unpack

    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    spec = write_archive(tmp_path, more=(member,))
    with pytest.raises(SollolError, match="not a plain file"):
        unpack(tmp_path / "tiny_engine-1.0.tar.gz", spec, into=tmp_path / "deep" / "source")
    assert not (tmp_path / "deep" / "source").exists()
    assert not (tmp_path / "out").exists()


def test_only_the_engines_folder_is_unpacked_with_its_execute_bits(tmp_path):
    from agent.engine.source import unpack

    spec = write_archive(tmp_path)
    unpack(tmp_path / "tiny_engine-1.0.tar.gz", spec, into=tmp_path / "source")
    assert {
        str(path.relative_to(tmp_path / "source")) for path in (tmp_path / "source").rglob("*") if path.is_file()
    } == {
        "program.sh",
        "deep/er/note.txt",
    }


def test_a_truncated_archive_is_refused(tmp_path):
    from agent.engine.source import unpack

    spec = write_archive(tmp_path)
    archive = tmp_path / "tiny_engine-1.0.tar.gz"
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(SollolError, match="cannot be unpacked"):
        unpack(archive, spec, into=tmp_path / "source")


def test_other_flags_or_another_source_are_another_build(tmp_path):
    spec = write_archive(tmp_path)
    fields = {name: getattr(spec, name) for name in spec.__struct_fields__}
    others = [type(spec)(**fields | change) for change in ({"flags": ()}, {"sha256": "1" * 64}, {"version": "2"})]
    assert len({spec.key, *(other.key for other in others)}) == 4


def test_the_real_build_speaks_rpc_runs_on_other_cpus_and_downloads_nothing():
    assert {"-DGGML_RPC=ON", "-DGGML_NATIVE=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_SUBPROCESS=OFF"} <= set(
        LLAMA_CPP.flags
    )
    assert LLAMA_CPP.targets == ("llama-server", "ggml-rpc-server")
