"""A source archive that pip takes for a package, and the tools that "build" it: what a build needs, in milliseconds."""

import hashlib
import io
import tarfile
from pathlib import Path

from agent.engine.built import BuildSpec

_BACKEND = """\
from pathlib import Path
def prepare_metadata_for_build_wheel(directory, settings=None):
    info = Path(directory, "tiny_engine-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-engine\\nVersion: 1.0\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nGenerator: tiny\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name
def build_wheel(directory, settings=None, metadata=None):
    raise NotImplementedError
"""
_FILES = {
    "tiny_engine-1.0/PKG-INFO": "Metadata-Version: 2.1\nName: tiny-engine\nVersion: 1.0\n",
    "tiny_engine-1.0/pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "tiny_engine-1.0/backend.py": _BACKEND,
    "tiny_engine-1.0/vendor/engine/program.sh": "#!/bin/sh\necho 'version: tiny (build 1)' >&2\n",
    "tiny_engine-1.0/vendor/engine/deep/er/note.txt": "hello",
}

_CMAKE = """\
#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in -S) source="$2" ;; -B) objects="$2" ;; esac
    echo "$1"
    shift
done >>"$CALLS"
mkdir -p "$objects/bin" && echo "$source" >"$objects/source"
"""
_NINJA = """\
#!/bin/sh
echo "ninja $*" >>"$CALLS"
cd "$2"
echo "[1/2] compiling"
[ -z "$NINJA_FAILS" ] || { i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo "error line $i"; done; exit 1; }
[ -z "$NINJA_HANGS" ] || { echo $$ >"$NINJA_HANGS.new"; mv "$NINJA_HANGS.new" "$NINJA_HANGS"; sleep 600; }
for target in llama-server ggml-rpc-server; do
    cp "$(cat source)/program.sh" "bin/$target" && chmod +x "bin/$target"
done
echo "[2/2] linking"
"""


def write_archive(folder: Path, *, more: tuple[tarfile.TarInfo, ...] = ()) -> BuildSpec:
    """Write tiny_engine-1.0.tar.gz into `folder` and return how to build it. `more`: members to smuggle in."""
    path = folder / "tiny_engine-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in _FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        for member in more:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return BuildSpec(
        package="tiny-engine",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source="vendor/engine",
        flags=("-DTINY=ON",),
        targets=("llama-server", "ggml-rpc-server"),
    )


def write_program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def build_environment(folder: Path) -> dict[str, str]:
    """Return an environment in which pip finds only what is in `folder`, and the tools are the ones above."""
    tools = folder / "tools"
    for name, text in (("cmake", _CMAKE), ("ninja", _NINJA), ("cc", "#!/bin/sh\n"), ("c++", "#!/bin/sh\n")):
        write_program(tools / name, text)
    return {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(folder),
        "CALLS": str(folder / "calls"),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
    }
