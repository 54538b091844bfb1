"""What users' own programs get from a running cluster: the engine's text, through every door."""

import asyncio
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import grpc_tools
import openai
import pytest
from redis import Redis

from tests.e2e.cluster import RECITAL_20, RECITED, chat_body, text_of
from tests.e2e.models import RANDOM, RECITER
from tests.tiny_model import PIECES

pytestmark = pytest.mark.engine
TOKENS = 60
TEXT = "".join(PIECES[:TOKENS])
PROTO = Path(__file__).parents[2] / "proto"


async def engine_says(cluster, model, **more):
    """The answer of the engine itself, asked on its unix socket."""
    await cluster.say(model)  # a pool of it runs now
    pool = await cluster.ready_pool(model)
    body = chat_body(model, max_tokens=TOKENS, **more)
    async with (
        cluster.engine(pool) as session,
        session.post("http://engine/v1/chat/completions", json=body) as response,
    ):
        return await response.json()


def official(cluster):
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="unused", max_retries=0, timeout=30)


async def test_the_openai_package_streams_the_text_that_the_engine_gives_itself(cluster):
    direct = await engine_says(cluster, RECITER)
    pieces, finish, usage = [], None, None
    async with official(cluster) as client:
        asked = chat_body(RECITER, max_tokens=TOKENS)
        async for chunk in await client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.append(choice.delta.content or "")
                finish = choice.finish_reason or finish

    assert direct["choices"][0]["message"]["content"] == "".join(pieces)
    assert "".join(pieces) == TEXT
    assert len(pieces) > TOKENS // 2, "the answer came as a stream and not as one piece"
    assert finish == "length"
    assert (direct["usage"]["prompt_tokens"], TOKENS) == (usage.prompt_tokens, usage.completion_tokens)


async def test_the_openai_package_gets_the_same_answer_in_one_piece(cluster):
    direct = await engine_says(cluster, RECITER)
    async with official(cluster) as client:
        answer = await client.chat.completions.create(**chat_body(RECITER, max_tokens=TOKENS))

    assert direct["choices"][0]["message"]["content"] == answer.choices[0].message.content
    assert direct["choices"][0]["finish_reason"] == answer.choices[0].finish_reason
    assert direct["usage"]["total_tokens"] == answer.usage.total_tokens
    assert answer.usage.completion_tokens == TOKENS


async def test_a_model_whose_words_depend_on_all_of_the_prompt_says_the_same_through_the_head(cluster):
    more = {"cache_prompt": False, "seed": 7}
    direct = await engine_says(cluster, RANDOM, **more)

    through = await cluster.say(RANDOM, max_tokens=TOKENS, **more)

    assert direct["choices"][0]["message"]["content"] == through


async def test_the_openai_package_continues_a_raw_prompt_and_lists_models(cluster):
    async with official(cluster) as client:
        answer = await client.completions.create(model=RECITER, prompt="Who?", max_tokens=RECITED, temperature=0)
        names = [model.id async for model in client.models.list()]

    assert answer.choices[0].text == RECITAL_20
    assert {RECITER, RANDOM} <= set(names)


async def test_the_openai_package_raises_its_own_error_for_an_unknown_model(cluster):
    async with official(cluster) as client:
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(**chat_body("tiny-recitr"))

    assert caught.value.code == "MODEL_NOT_FOUND"


async def test_a_recital_to_its_end_loses_and_repeats_no_token(cluster):
    text = []
    async with cluster.stream(RECITER, max_tokens=4000) as events:
        async for event in events:
            text.append(text_of(event))

    assert "".join(PIECES) == "".join(text)
    assert event == {"done": True}


async def test_stubs_that_plain_grpcio_tools_makes_stream_the_same_text_without_our_packages(cluster, tmp_path):
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    made = [f"-I{PROTO}", f"-I{include}", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *made, *protos], check=True, cwd=tmp_path)
    program = Path(__file__).with_name("plain_stub.py")
    packages = sysconfig.get_path("purelib")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", program, tmp_path, packages, cluster.head, RECITER),
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 40)

    assert process.returncode == 0, err.decode()
    answer = json.loads(out)
    assert answer["ours"] == []
    assert answer["stubs"].startswith(str(tmp_path))
    assert answer["text"] == TEXT
    assert answer["pieces"] > 1
    assert (answer["finish_reason"], answer["completion_tokens"]) == ("length", TOKENS)


async def test_redis_shows_each_node_in_the_fields_of_the_seed(cluster):
    async with cluster.client() as client:
        reports = [node.report for node in await client.nodes()]
    with Redis(unix_socket_path=str(cluster.redis_socket), decode_responses=True) as redis:
        for report in reports:
            shown = json.loads(redis.get(f"sollol:rpc:node:{report.host}:{report.port}"))
            gpus = [device for device in report.devices if device.kind == "GPU" and device.usable]

            assert {"has_gpu", "gpu_devices", "gpu_vram_mb", "gpu_names", "cpu_ram_mb"} == set(shown)
            assert report.devices[0].total_bytes >> 20 == shown["cpu_ram_mb"] > 100
            assert bool(gpus) is shown["has_gpu"]
            assert len(gpus) == len(shown["gpu_devices"]) == len(shown["gpu_vram_mb"]) == len(shown["gpu_names"])


async def test_every_key_in_redis_has_a_lease_but_the_history(cluster):
    await cluster.say(RECITER)
    with Redis(unix_socket_path=str(cluster.redis_socket), decode_responses=True) as redis:
        keys = sorted(redis.scan_iter())
        forever = {key for key in keys if redis.pttl(key) == -1}

    assert len(keys) >= 5  # two nodes, each under two keys, and their index
    assert forever <= {"sollol:events"}
