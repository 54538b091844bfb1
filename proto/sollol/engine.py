"""The engine of a node, as its report says: values, as those of `sollol.report`."""

from enum import StrEnum

from msgspec import Struct


class EngineSource(StrEnum):
    CONFIGURED = "CONFIGURED"
    PATH = "PATH"
    BUILT = "BUILT"
    XLLAMACPP = "XLLAMACPP"


class Engine(Struct, frozen=True, kw_only=True):
    source: EngineSource
    path: str
    build: str
    rpc: bool = False
    rpc_protocol: str = ""
    threads: int = 0
