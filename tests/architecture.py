"""The rules of DESIGN.md that a program can check, as functions over a source tree: each returns what breaks a rule."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# Where a module lives decides what it must not import: (path prefix, forbidden prefixes of imported names).
LAYERS = {
    "proto/sollol/": ("agent", "sollold"),
    "agent/": ("sollold",),
    "sollold/": ("agent",),
}
PURE = (
    "sollold/placement/",
    "sollold/survey.py",
    "proto/sollol/errors.py",
    "proto/sollol/report.py",
    "proto/sollol/engine.py",
    "proto/sollol/speed.py",
    "agent/speed_meter.py",
    "agent/speed_records.py",
    "proto/sollol/link.py",
    "proto/sollol/memory.py",
    "proto/sollol/compute/",
    "proto/sollol/architectures.py",
    "agent/supervisor/buffers.py",
    "agent/supervisor/comparison.py",
    "proto/sollol/correction.py",
    "proto/sollol/names.py",
    "proto/sollol/redaction.py",
    "proto/sollol/topics.py",
    "proto/sollol/mqtt_outbox.py",
    "proto/sollol/identity.py",
    "proto/sollol/certificates.py",
    "proto/sollol/revocations.py",
    "proto/sollol/material.py",
    "proto/sollol/running.py",
    "proto/sollol/access.py",
    "agent/rate.py",
    "agent/presence/state.py",
    "agent/presence/events.py",
    "agent/presence/home_assistant.py",
    "agent/supervisor/state.py",
    "agent/supervisor/restarts.py",
    "agent/supervisor/command.py",
    "agent/supervisor/allowance.py",
    "agent/engine/environment.py",
    "sollold/scaling.py",
    "sollold/decision_event.py",
    "sollold/gauges.py",
    "sollold/front/mqtt_messages.py",
    "sollold/keys.py",
    "sollold/allowance.py",
    "sollold/turns.py",
    "sollold/drain.py",
    "sollold/options.py",
)
IMPURE_IMPORTS = (
    "asyncio",
    "grpc",
    "redis",
    "structlog",
    "time",
    "random",
    "aiohttp",
    "aiomqtt",
    "socket",
    "subprocess",
)
# `_pb2` types stop at the gRPC edges.
GRPC_EDGES = (
    "proto/sollol/v1/",
    "proto/sollol/wire.py",
    "proto/sollol/client.py",
    "proto/sollol/channels.py",
    "proto/sollol/inference.py",
    "agent/server.py",
    "agent/link_probe.py",
    "agent/revocation.py",
    "agent/listening.py",
    "sollold/server.py",
    "agent/relay.py",
    "agent/outbox.py",
    "sollold/agent_link.py",
    "sollold/agent_line.py",
    "sollold/relay.py",
    "sollold/front/grpc.py",
    "sollold/operators.py",
    "sollold/cli/",
)
COMPOSERS = ("agent/app.py", "sollold/app.py")
# What only a composer of a daemon needs: whoever has it puts parts together.
COMPOSING = ("sollol.lifecycle.Closing", "sollol.mqtt.Connection")
ENTRY_POINTS = ("proto/sollol/config.py", "/__main__.py", "sollold/cli/", "agent/engine/__main__.py")
MODULE_LINES, FUNCTION_LINES = 300, 60


def modules(root: Path) -> Iterator[tuple[str, ast.Module, int]]:
    """Every hand-written module under the three packages: path relative to root, tree and number of lines."""
    for folder in ("proto/sollol", "agent", "sollold"):
        for path in sorted((root / folder).rglob("*.py")):
            if "_pb2" not in path.name:
                text = path.read_text()
                yield str(path.relative_to(root)), ast.parse(text), text.count("\n")


def imported(tree: ast.Module) -> Iterator[str]:
    """Every name imported anywhere in a module, in full: `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{item.name}" for item in node.names)


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def forbidden_imports(root: Path) -> list[str]:
    """Imports against the layers, impure ones in pure modules, composing ones beside `app`, and `_pb2` off the edges."""
    found = []
    for path, tree, _ in modules(root):
        layer = next(names for prefix, names in LAYERS.items() if path.startswith(prefix))
        for name in imported(tree):
            if _under(name, layer):
                found.append(f"{path} imports {name}: the layers are sollold -> sollol <- agent")
            if path.startswith(PURE) and _under(name, IMPURE_IMPORTS):
                found.append(f"{path} imports {name}: this module is pure")
            if name in COMPOSING and path.startswith(("agent/", "sollold/")) and path not in COMPOSERS:
                found.append(f"{path} imports {name}: only app.py puts the parts together")
            if path in COMPOSERS and "_pb2_grpc" in name:
                continue  # registering services on a server is composing
            if ("_pb2" in name or name.startswith("sollol.v1")) and not path.startswith(GRPC_EDGES):
                found.append(f"{path} imports {name}: protobuf types stop at the gRPC edges")
    return found


def stray_reads(root: Path) -> list[str]:
    """Environment and argv away from the entry points, Redis keys away from the registry."""
    found = []
    for path, tree, _ in modules(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not any(part in path for part in ENTRY_POINTS):
                read = f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else ""
                if read in ("os.environ", "os.getenv", "sys.argv") and path != "proto/sollol/__init__.py":
                    found.append(f"{path}:{node.lineno} reads {read}: only config and entry points do")
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and re.match(r"sollol:\w", node.value)
                and path != "proto/sollol/registry.py"
            ):
                found.append(f"{path}:{node.lineno} spells the key {node.value!r}: only registry knows keys")
    return found


def oversized(root: Path) -> list[str]:
    """Modules and functions over the budget."""
    found = []
    for path, tree, lines in modules(root):
        if lines > MODULE_LINES:
            found.append(f"{path} has {lines} lines, more than {MODULE_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno} {node.name} has {length} lines, more than {FUNCTION_LINES}")
    return found
