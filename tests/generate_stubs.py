"""Writes the committed stubs of `sollol.v1` from the protos: `make proto`. A test proves that they are fresh."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROTO = ROOT / "proto"
PLUGINS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(out: Path) -> None:
    """Run the pinned protoc over every proto and write the stubs under `out`.

    Raises:
        subprocess.CalledProcessError: a proto does not compile; protoc has said why on stderr.
    """
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    # protoc finds its mypy plugins on PATH, where they are not unless the virtual environment is activated.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I.", *(f"--{plugin}_out={out}" for plugin in PLUGINS), *sources],
        cwd=PROTO,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    generate(PROTO)
