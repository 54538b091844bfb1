"""The CLI as its users run it: a process, its two outputs, its exit status."""

import asyncio
import json
import os
import sys

import pytest
from sollol.report import PlacementWish

from tests.certificates import authority, write_identity
from tests.fakes.fake_head import NODES, fake_head
from tests.placement_cases import MODEL
from tests.sollol_command import sollol


@pytest.fixture
async def head():
    async with fake_head() as running:
        yield running


@pytest.mark.parametrize("address", ["bighost", "bighost:", ":7461", "bighost:grpc"])
async def test_an_address_that_is_none_is_said_to_be_none(tmp_path, address):
    tls = write_identity(tmp_path, authority(), "admin", "me")

    status, _, err = await sollol("--head", address, "--tls-dir", str(tls), "nodes")

    assert (status, f"'{address}' is not HOST:PORT" in err) == (2, True), err


async def test_a_reader_of_the_output_who_leaves_is_no_error(head):
    _, address = head
    reads, writes = os.pipe()
    os.close(reads)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sollold.cli", "--head", address, "pools"),
        stdout=writes,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writes)

    _, err = await asyncio.wait_for(process.communicate(), 20)

    assert (process.returncode, err) == (0, b"")


async def test_nodes_links_models_and_pools_are_tables_for_people(head):
    _, address = head

    for command, shown in (
        ("nodes", ("NODE", "big", "CUDA0 24.00 GiB / 24.00 GiB", "none: run `sollol engine build` there")),
        ("links", ("small", "0.31 ms", "112.0 MB/s", "41 s ago", "attic", "out of reach", "4 s ago")),
        ("models", (MODEL, "warm", "ENGINE_DIED: the engine died")),
        ("pools", ("tiny-0", "READY", "1 / 3")),
    ):
        status, out, err = await sollol("--head", address, command)

        assert (status, err) == (0, "")
        assert "\x1b" not in out
        for text in shown:
            assert text in out


async def test_pools_are_listed_by_number_with_the_layers_and_bytes_of_each_device(head):
    _, address = head

    _, out, _ = await sollol("--head", address, "pools")

    head_row, *rows = [line.split() for line in out.splitlines()]
    assert " ".join(head_row) == (
        "MODEL POOL STATE SLOTS USED / FREE CONTEXT MS/TOKEN SEEN / PREDICTED ID LISTENS NODE DEVICE LAYERS MEMORY"
    )
    assert rows == [
        [
            MODEL,
            "0",
            "READY",
            "1",
            "/",
            "3",
            "0",
            "16.6",
            "/",
            "18.8",
            "tiny-0",
            "http://10.0.0.1:18080",
            "big",
            "CPU",
            "none",
            "512.00",
            "MiB",
        ],
        ["small", "CPU", "0-20", "2.00", "GiB"],
        ["big", "CUDA0", "21-31", "+", "output", "1.00", "GiB"],
        [MODEL, "1", "READY", "0", "/", "4", "0", "-", "/", "-", "tiny-1", "-", "small", "-", "-", "-"],
    ]


async def test_every_read_has_json_with_a_schema(head):
    _, address = head

    for command, length in (("nodes", len(NODES)), ("links", 2), ("models", 2), ("pools", 2)):
        _, out, _ = await sollol("--head", address, command, "--json")

        assert f"sollol.{command}/v1" == json.loads(out)["schema"]
        assert length == len(json.loads(out)[command])


async def test_place_sends_the_whole_wish_and_shows_the_decision(head):
    servicer, address = head
    flags = [
        "--policy",
        "fit",
        "--strategy",
        "spread",
        "--context",
        "1024",
        "--parallel",
        "2",
        "--kv-type",
        "q8_0",
        "--prefer",
        "ssd",
        "--require",
        "a=b",
        "--max-nodes",
        "3",
        "--backends-per-pool",
        "0",
        "--no-allow-reduced-context",
    ]

    status, out, _ = await sollol(
        "--head", address, "place", MODEL, *flags, "--min-cpus", "2", "--pin", "big", "--json"
    )

    expected = PlacementWish(
        model=MODEL,
        policy="fit",
        strategy="spread",
        context_per_slot=1024,
        parallel=2,
        kv_type="q8_0",
        prefer=("ssd",),
        require=("a=b",),
        min_cpus=2,
        pinned_node="big",
        max_nodes=3,
        backends_per_pool=0,
        allow_reduced_context=False,
    )
    assert [expected] == servicer.asked
    assert status == 5
    assert json.loads(out)["refusal"]["reason"] == "NO_FIT"
    assert [entry["refusal"]["reason"] for entry in json.loads(out)["nodes"]] == ["LABEL_MISSING", "NOT_PINNED"]


async def test_place_shows_devices_and_layers_of_the_plan(head):
    _, address = head

    status, out, _ = await sollol("--head", address, "place", MODEL)

    assert status == 0
    assert "ENGINE_MISSING" in out
    assert "0-7 + output" in out


async def test_run_streams_to_standard_output_only(head):
    servicer, address = head

    status, out, err = await sollol("--head", address, "run", MODEL, "Hi", "--system", "Be brief", "--max-tokens", "5")

    assert (status, out, err) == (0, "Hello, world\n", "")
    (request,) = servicer.asked
    assert [(message.role, message.content) for message in request.messages] == [("system", "Be brief"), ("user", "Hi")]
    assert request.sampling.max_tokens == 5
    assert not request.sampling.HasField("temperature")


async def test_what_is_piped_in_is_the_prompt_or_follows_it(head):
    servicer, address = head

    await sollol("--head", address, "run", MODEL, stdin=b"from a pipe\n")
    _, out, _ = await sollol("--head", address, "run", MODEL, "Sum up:", "--raw", stdin=b"a text\n")

    assert servicer.asked[0].messages[0].content == "from a pipe"
    assert out == "Sum up:\n\na text!\n"


async def test_a_prompt_is_needed(head):
    _, address = head

    status, out, err = await sollol("--head", address, "run", MODEL)

    assert (status, out) == (2, "")
    assert "no prompt" in err


async def test_a_refusal_is_one_clear_line_and_the_exit_code_of_its_reason(head):
    _, address = head

    status, out, err = await sollol("--head", address, "run", "nope", "Hi")

    assert (status, out) == (4, "")
    assert "sollol: MODEL_NOT_FOUND: no node has a model named 'nope'; closest: tiny:8b\n" in err
    assert "Traceback" not in err
    assert "Traceback" in (await sollol("--debug", "--head", address, "run", "nope", "Hi"))[2]


async def test_an_engine_that_dies_mid_stream_is_said_after_what_came(head):
    _, address = head

    status, out, err = await sollol("--head", address, "run", "dies", "Hi")

    assert (status, out) == (6, "Hello\n")
    assert "  | last words" in err


async def test_load_unload_and_logs(head):
    _, address = head

    assert await sollol("--head", address, "load", MODEL) == (0, "tiny:8b: pool 0 is ready on big as tiny-0\n", "")
    _, out, _ = await sollol("--head", address, "load", MODEL, "--pools", "2")
    assert out.splitlines()[1] == "tiny:8b: pool 1 is ready on small as tiny-1"
    _, out, _ = await sollol("--head", address, "load", MODEL, "--json")
    assert [pool["instance"]["pool_number"] for pool in json.loads(out)["pools"]] == [0]
    assert await sollol("--head", address, "unload", MODEL) == (0, "stopped tiny-0\n", "")
    assert await sollol("--head", address, "unload", "x") == (0, "", "no pool of x was running\n")
    assert await sollol("--head", address, "logs", MODEL, "-n", "2") == (0, "line 0\nline 1\n", "")


async def test_no_head_is_exit_3_and_says_what_to_do(ports):
    status, out, err = await sollol("--head", f"127.0.0.1:{ports()}", "nodes")

    assert (status, out) == (3, "")
    assert "sollol up" in err
    assert "Traceback" not in err


async def test_the_environment_names_the_head(head):
    import os

    _, address = head

    assert (await sollol("pools", env={**os.environ, "SOLLOL_HEAD": address}))[0] == 0


async def test_help_lists_the_commands_and_imports_nothing_heavy():
    status, out, _ = await sollol("--help")
    heavy = (
        "import sys, sollold.cli.arguments as a; a.parser(); print({'grpc', 'msgspec', 'asyncio'} & set(sys.modules))"
    )
    check = await asyncio.create_subprocess_exec(sys.executable, "-c", heavy, stdout=asyncio.subprocess.PIPE)
    printed, _ = await check.communicate()

    assert status == 0
    for command in ("up", "nodes", "models", "pools", "run", "place", "load", "unload", "logs", "engine"):
        assert f"\n    {command} " in out
    assert printed == b"set()\n"


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fly",),
        ("run",),
        ("up", "--agents", "0"),
        ("up", "--http-port", "70000"),
        ("place", "m", "--policy", "x"),
        ("place", "m", "--max-nodes", "0"),
        ("place", "m", "--backends-per-pool", "-1"),
        ("place", "m", "--pools", "2"),
        ("place", "m", "--context", "99999999999"),
        ("place", "m", "--parallel", "-1"),
        ("place", "m", "--min-cpus", "many"),
        ("place", "--what-if", "context=1"),
        ("place", "m", "--what-if"),
        ("load", "m", "--pools", "0"),
        ("load", "m", "--what-if", "context=1"),
    ],
)
async def test_wrong_usage_is_exit_2(words):
    status, out, err = await sollol(*words)

    assert (status, out) == (2, "")
    assert "usage: sollol" in err


async def test_place_works_without_a_head_over_a_node_list():
    nodes = b'[{"host": "h", "cpu_ram_mb": 20000}]'

    status, out, _ = await sollol("place", "m:8b", "--nodes", "-", stdin=nodes)
    refused, _, err = await sollol("place", "m:8b", "--nodes", "-", "--policy", "fit", stdin=nodes)

    assert status == 0
    assert "  h: RAM=20000MB, GPU_VRAM=0MB, score=3616 [ok] BEST\n" in out
    assert refused == 2
    assert "GGUF header" in err


async def test_a_missing_node_file_is_one_line(tmp_path):
    status, _, err = await sollol("place", "m", "--nodes", str(tmp_path / "none.json"))

    assert status == 2
    assert err.count("\n") == 1
