"""The committed stubs are what users import, so they must be exactly what the protos say."""

import re
from importlib.metadata import version
from pathlib import Path

from tests.generate_stubs import PROTO, generate


def stubs(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*_pb2*.py*") if path.suffix != ".pyc"}


def test_the_committed_stubs_are_fresh(tmp_path):
    generate(tmp_path)
    fresh = stubs(tmp_path)
    committed = stubs(PROTO)
    assert sorted(committed) == sorted(fresh)
    stale = sorted(name for name, text in fresh.items() if committed[name] != text)
    assert not stale, "run `make proto` and commit the result"


def test_the_stubs_load_under_the_oldest_runtime_that_the_package_allows():
    allowed = (PROTO.parent / "pyproject.toml").read_text()
    generated_with = re.search(
        r"GRPC_GENERATED_VERSION = '(\d+\.\d+)", (PROTO / "sollol/v1/agent_pb2_grpc.py").read_text()
    )
    assert f'"grpcio>={generated_with[1]}' in allowed
    assert version("grpcio-tools").startswith(generated_with[1])
