"""The log lines are llama-server's own, taken from runs."""

import pytest
from sollol.errors import SUSPECTED_BACKENDS, Reason, Retry
from sollol.report import BackendEndpoint

from agent.supervisor.failure import classify, ended, stalled, unreachable

LOADING_FAILED = (
    "0.00.005.212 E llama_model_load: error loading model: llama_model_loader: failed to load model from m.gguf",
    "0.00.005.213 E llama_model_load_from_file_impl: failed to load model",
    "0.00.005.707 E srv  llama_server: exiting due to model loading error",
)


@pytest.mark.parametrize(
    ("line", "reason", "retry"),
    [
        ("E gguf_init_from_file: failed to open GGUF file 'm.gguf' (No such file or directory)", Reason.MODEL_ABSENT, Retry.RETRYABLE),
        ("E gguf_init_from_reader: invalid magic characters: 'abcd', expected 'GGUF'", Reason.MODEL_CORRUPT, Retry.FATAL),
        ("E tensor 'output.weight' data is not within the file bounds, model is corrupted or incomplete", Reason.MODEL_CORRUPT, Retry.FATAL),
        ("E llama_model_load: error loading model: check_tensor_dims: tensor 'token_embd.weight' not found", Reason.MODEL_CORRUPT, Retry.FATAL),
        ("E llama_model_load: error loading model: unknown model architecture: 'mystery'", Reason.MODEL_UNSUPPORTED, Retry.FATAL),
        ("E llama_model_load: error loading model: unable to allocate CUDA0 buffer", Reason.OUT_OF_MEMORY, Retry.RETRYABLE),
        ("E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache", Reason.OUT_OF_MEMORY, Retry.RETRYABLE),
        ("E ggml_aligned_malloc: insufficient memory (attempted to allocate 400000.00 MB)", Reason.OUT_OF_MEMORY, Retry.RETRYABLE),
    ],
)  # fmt: skip
def test_a_load_that_fails_says_why(line: str, reason: Reason, retry: Retry) -> None:
    refusal = classify(1, (line, *LOADING_FAILED), was_ready=False, model="m")
    assert (refusal.reason, refusal.retry) == (reason, retry)
    assert refusal.log_lines == (line, *LOADING_FAILED)
    assert refusal.numbers == {"exit_code": 1}


def test_a_taken_socket_is_a_taken_port() -> None:
    tail = (
        "E srv start: couldn't bind HTTP server socket, hostname: /x.sock, port: 8080",
        "exiting due to HTTP server error",
    )
    assert classify(1, tail, was_ready=False, model="m").reason is Reason.PORT_TAKEN


def test_an_engine_that_does_not_know_a_flag_failed_to_start() -> None:
    refusal = classify(1, ("error: invalid argument: --no-kv-unified",), was_ready=False, model="m")
    assert refusal.reason is Reason.ENGINE_START_FAILED
    assert "newer engine" in refusal.message


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-6, "SIGABRT"), (-11, "SIGSEGV")])
@pytest.mark.parametrize("was_ready", [True, False])
def test_a_signal_is_a_death(code: int, name: str, was_ready: bool) -> None:
    refusal = classify(code, ("last words",), was_ready=was_ready, model="m")
    assert refusal.reason is Reason.ENGINE_DIED
    assert refusal.retry is Retry.RETRYABLE
    assert refusal.numbers == {"exit_code": code}
    assert name in refusal.message


def test_any_other_end_at_start_failed_to_start_and_while_serving_is_a_death() -> None:
    assert classify(1, (), was_ready=False, model="m").reason is Reason.ENGINE_START_FAILED
    assert classify(1, (), was_ready=True, model="m").reason is Reason.ENGINE_DIED


def test_an_allocation_that_failed_long_before_the_death_does_not_explain_it() -> None:
    early, late = "E failed to allocate graph", "terminate called after throwing"
    assert classify(-6, (early, *["I fine"] * 10, late), was_ready=True, model="m").reason is Reason.ENGINE_DIED
    assert classify(-6, ("CUDA error: out of memory",), was_ready=True, model="m").reason is Reason.OUT_OF_MEMORY


BACKENDS = (
    BackendEndpoint(node_id="n1", host="10.0.0.1", port=7500, device_ids=("CPU",)),
    BackendEndpoint(node_id="n2", host="10.0.0.2", port=7500, device_ids=("CPU",)),
)
CRASHED = "/src/ggml-rpc.cpp:566: Remote RPC server crashed or returned malformed response"


@pytest.mark.parametrize("was_ready", [True, False])
def test_a_lost_backend_is_named_with_every_node_that_it_may_have_been(was_ready: bool) -> None:
    refusal = classify(-6, ("I fine", CRASHED), was_ready=was_ready, model="m", backends=BACKENDS)
    assert (refusal.reason, refusal.retry) == (Reason.ENGINE_DIED, Retry.RETRYABLE)
    assert "its backend on n1 or n2 was lost" in refusal.message
    assert refusal.numbers == {"exit_code": -6, SUSPECTED_BACKENDS: 2}
    alone = classify(-6, (CRASHED,), was_ready=was_ready, model="m", backends=BACKENDS[1:])
    assert "its backend on n2 was lost" in alone.message
    assert SUSPECTED_BACKENDS not in alone.numbers


def test_a_backend_that_cannot_be_reached_is_named_by_its_node() -> None:
    line = "/src/ggml-rpc.cpp:547: Failed to connect to 10.0.0.2:7500"
    refusal = classify(-6, (line,), was_ready=False, model="m", backends=BACKENDS)
    assert refusal.reason is Reason.ENGINE_DIED
    assert "its backend on n2 was lost" in refusal.message


def test_a_backend_of_another_build_failed_to_start() -> None:
    tail = ("E RPC server version mismatch: 6.0.0", "/src/ggml-rpc.cpp:550: RPC handshake failed for 10.0.0.1:7500")
    refusal = classify(-6, tail, was_ready=False, model="m", backends=BACKENDS)
    assert refusal.reason is Reason.ENGINE_START_FAILED
    assert "backend on n1 speaks another protocol" in refusal.message


def test_an_engine_without_rpc_is_the_wrong_engine() -> None:
    tail = ('error while handling argument "--rpc": RPC not supported in this build',)
    assert classify(1, tail, was_ready=False, model="m", backends=BACKENDS).reason is Reason.ENGINE_MISSING


def test_backends_are_not_blamed_by_an_engine_without_any() -> None:
    assert "backend" not in classify(-6, (CRASHED,), was_ready=True, model="m").message


def test_a_start_that_hangs_before_it_says_a_word_waits_for_its_backends() -> None:
    refusal = unreachable("m", BACKENDS, 20.3, ())
    assert refusal.reason is Reason.ENGINE_STALLED
    assert "20 s for its backend on n1 or n2" in refusal.message


def test_only_the_last_twenty_lines_are_kept() -> None:
    lines = tuple(f"line {number}" for number in range(40))
    assert classify(1, lines, was_ready=False, model="m").log_lines == lines[-20:]
    assert stalled("m", 600.4, lines).log_lines == lines[-20:]


def test_an_end_is_named_for_people() -> None:
    assert [ended(code) for code in (0, 1, -15, -250)] == ["exit status 0", "exit status 1", "SIGTERM", "signal 250"]
