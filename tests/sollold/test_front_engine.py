"""The front's idea of the engine against the engine itself."""

import asyncio
import json
import tempfile
from pathlib import Path

import aiohttp
import pytest
from sollol.errors import Reason, SollolError

from sollold.front import requests
from sollold.front.assemble import Assembly
from sollold.front.openai import read_engine_error
from sollold.front.sse import Ending, EventReader, Passage
from tests.waiting import wait_until

pytestmark = pytest.mark.engine

# These differ between any two answers.
VOLATILE = ("id", "created", "timings")
CALL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
async def engine(engine_binary, reciting_model):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        socket = Path(folder) / "e.sock"
        log = (Path(folder) / "log").open("wb")
        process = await asyncio.create_subprocess_exec(
            engine_binary, "-m", reciting_model, "--host", socket, "--alias", "tiny", "-c", "512", "-np", "1", "-t", "1",
            "--no-ui", "--offline", stdout=log, stderr=log, env={},
        )  # fmt: skip
        try:
            async with aiohttp.ClientSession(
                "http://engine", connector=aiohttp.UnixConnector(str(socket), force_close=True)
            ) as session:
                await wait_until(lambda: _healthy(session), within_s=30, what="the engine is ready")
                yield session
        finally:
            process.kill()
            await process.wait()
            log.close()


async def _healthy(session):
    try:
        async with session.get("/health") as response:
            return response.status == 200
    except aiohttp.ClientConnectorError:
        return False


async def streamed(engine, asked):
    async with engine.post(asked.engine.path, data=asked.engine.body) as response:
        return [chunk async for chunk in response.content.iter_any()]


async def whole(engine, asked):
    body = {**json.loads(asked.engine.body), "stream": False}
    async with engine.post(asked.engine.path, json=body) as response:
        return await response.json()


@pytest.mark.parametrize(
    "asked",
    [
        requests.chat({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20}),
        requests.chat({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True,
                       "top_logprobs": 2, "max_tokens": 4, "stop": ["zzz"], "seed": 3}),
        requests.chat({"model": "tiny", "messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]},
                       {"role": "developer", "content": "y"}, {"role": "user", "content": "z"}], "max_tokens": 400}),
        requests.completion({"model": "tiny", "prompt": "say", "max_tokens": 20, "temperature": 0}),
        requests.completion({"model": "tiny", "prompt": [5, 6, 7], "logprobs": 2, "max_tokens": 3}),
    ],
)  # fmt: skip
async def test_the_assembled_answer_is_the_engines_own(engine, asked):
    reader, assembly, passage = EventReader(), Assembly(asked.engine.path), Passage()
    chunks = await streamed(engine, asked)
    for chunk in chunks:
        for data in reader.feed(chunk):
            assembly.feed(data)
    assert assembly.complete
    ours, theirs = assembly.result(), await whole(engine, asked)
    ours["usage"].pop("prompt_tokens_details", None)  # how much of the prompt was still in the cache
    theirs["usage"].pop("prompt_tokens_details", None)
    assert set(ours) == set(theirs)
    for name in set(ours) - set(VOLATILE):
        assert ours[name] == theirs[name], name
    assert b"".join(map(passage.feed, chunks)) == b"".join(chunks)
    assert passage.finish() == (b"", Ending.DONE)


async def test_every_parameter_that_we_let_pass_is_one_the_engine_takes(engine):
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "hi", "name": "me"}], "temperature": 5, "top_p": 0,
        "top_k": 0, "min_p": 1, "typical_p": 1, "presence_penalty": -2, "frequency_penalty": 2, "repeat_penalty": 1.1,
        "repeat_last_n": 64, "max_tokens": 2, "max_completion_tokens": 2, "seed": -1, "stop": ["a", ""],
        "logit_bias": {"5": -100}, "cache_prompt": False, "stream_options": {"include_usage": True},
        "response_format": {"type": "json_object"}, "chat_template_kwargs": {"x": 1}, "reasoning_effort": "low",
        "reasoning_format": "none", "stream": True,
    }  # fmt: skip
    assert b"data: [DONE]" in b"".join(await streamed(engine, requests.chat(body)))
    tools = {
        "tools": [CALL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": True,
    }
    del body["response_format"]
    assert b"data: [DONE]" in b"".join(await streamed(engine, requests.chat({**body, **tools})))


async def test_a_prompt_beyond_the_context_is_a_refusal_with_numbers(engine):
    asked = requests.completion({"model": "tiny", "prompt": [5] * 600})
    async with engine.post(asked.engine.path, data=asked.engine.body) as response:
        refusal = read_engine_error(response.status, await response.read()).refusal
    assert refusal.reason is Reason.CONTEXT_TOO_LONG
    assert refusal.numbers == {"n_prompt_tokens": 600, "n_ctx": 512}
    assert "600" in refusal.message


async def test_what_only_the_engine_can_judge_is_a_refusal_too(engine):
    asked = requests.completion({"model": "tiny", "prompt": [1_000_000]})
    async with engine.post(asked.engine.path, data=asked.engine.body) as response:
        error = read_engine_error(response.status, await response.read())
    assert isinstance(error, SollolError)
    assert error.refusal.reason is Reason.INVALID_REQUEST
