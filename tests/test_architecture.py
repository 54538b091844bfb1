"""Who may import whom, what stays pure, and how big things may get: DESIGN.md, checked. Part of `make check`."""

from pathlib import Path

import pytest

from tests import architecture

ROOT = Path(__file__).parents[1]


def planted(root: Path, path: str, source: str) -> Path:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)
    return root


def test_nobody_imports_what_the_layers_forbid():
    assert architecture.forbidden_imports(ROOT) == []


def test_environment_argv_and_redis_keys_stay_where_they_belong():
    assert architecture.stray_reads(ROOT) == []


def test_modules_and_functions_stay_within_the_budget():
    assert architecture.oversized(ROOT) == []


def test_no_init_directly_in_proto_because_it_would_shadow_proto_plus():
    assert not (ROOT / "proto" / "__init__.py").exists()


@pytest.mark.parametrize("path", architecture.PURE + architecture.GRPC_EDGES)
def test_the_rules_name_only_modules_that_exist(path):
    assert (ROOT / path).exists(), f"{path} is gone: tests/architecture.py must follow"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agent/probe.py", "import sollold.config"),
        ("agent/probe.py", "from sollold import config"),
        ("sollold/app.py", "from agent.config import AgentConfig"),
        ("proto/sollol/client.py", "from sollold.pools import Pools"),
        ("sollold/placement/fit.py", "import time"),
        ("sollold/placement/fit.py", "def late():\n    from asyncio import sleep"),
        ("agent/supervisor/state.py", "import structlog"),
        ("proto/sollol/memory.py", "import redis.asyncio"),
        ("sollold/front/mqtt.py", "from sollol.lifecycle import Closing, Stop"),
        ("agent/presence/presence.py", "def late():\n    from sollol.mqtt import Connection"),
        ("sollold/dispatch.py", "from sollol.v1 import agent_pb2"),
        ("sollold/dispatch.py", "from sollol.v1.agent_pb2 import Report"),
    ],
)
def test_a_planted_forbidden_import_is_caught(tmp_path, path, source):
    (found,) = architecture.forbidden_imports(planted(tmp_path, path, source))
    assert found.startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agent/probe.py", "import os\nvalue = os.environ['X']"),
        ("sollold/app.py", "import sys\nprint(sys.argv)"),
        ("sollold/nodes.py", "key = 'sollol:rpc:node:a:1'"),
        ("sollold/nodes.py", "key = f'sollol:rpc:node:{host}'"),
    ],
)
def test_a_planted_stray_read_is_caught(tmp_path, path, source):
    assert len(architecture.stray_reads(planted(tmp_path, path, source))) == 1


def test_a_planted_long_function_and_module_are_caught(tmp_path):
    body = "def long():\n" + "    pass\n" * 61 + "x = 1\n" * 300
    assert len(architecture.oversized(planted(tmp_path, "agent/probe.py", body))) == 2


def test_allowed_imports_are_left_alone(tmp_path):
    planted(tmp_path, "agent/server.py", "import agent.ledger\nfrom sollol.v1 import agent_pb2\nimport sollol.report")
    planted(tmp_path, "sollold/placement/fit.py", "import math\nfrom sollol.memory import need")
    planted(tmp_path, "agent/__main__.py", "import os\nprint(os.environ)")
    assert architecture.forbidden_imports(tmp_path) == []
    assert architecture.stray_reads(tmp_path) == []
