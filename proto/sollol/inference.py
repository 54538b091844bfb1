"""What users send and get: frozen values, field for field those of `inference.proto`, which documents them."""

from msgspec import Struct

from sollol.errors import Refusal


class Message(Struct, frozen=True):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str


class Sampling(Struct, frozen=True, kw_only=True):
    """None keeps the engine's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repeat_penalty: float | None = None


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NodeProgress(Struct, frozen=True, kw_only=True):
    node_id: str
    percent: float


class Progress(Struct, frozen=True, kw_only=True):
    """What a waiter is told before the first token. `state`: "queued", "placing" or "loading"."""

    state: str
    percent: float = 0.0
    node_id: str = ""
    nodes: tuple[NodeProgress, ...] = ()


class Piece(Struct, frozen=True, kw_only=True):
    """A part of the answer; `finish_reason` (stop, length, tool_calls) and `usage` come with the last one."""

    text: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    reasoning: str = ""


class AvailableModel(Struct, frozen=True, kw_only=True):
    """A model that some live node has. `warm`: a pool of it is ready. `problem`: every copy is unusable."""

    name: str
    size_bytes: int = 0
    node_ids: tuple[str, ...] = ()
    warm: bool = False
    architecture: str = ""
    quantization: str = ""
    context_length: int = 0
    aliases: tuple[str, ...] = ()
    problem: Refusal | None = None
