"""Where engines that were built here live: `<cache>/engine/<key>/bin/`, one directory per source, flags and machine."""

import hashlib
import os
import platform
from pathlib import Path

from msgspec import Struct

BINARY = "llama-server"


class BuildSpec(Struct, frozen=True, kw_only=True):
    """What is built and how. `source` is the folder within the source archive that cmake gets."""

    package: str
    version: str
    sha256: str
    source: str
    flags: tuple[str, ...]
    targets: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the result: another source, flags or machine give another key."""
        text = "\n".join((self.sha256, self.source, *self.flags, *self.targets))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.package}-{self.version}-{platform.machine()}-{digest}"


LLAMA_CPP = BuildSpec(
    package="llama-cpp-python",
    version="0.3.36",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    source="vendor/llama.cpp",
    flags=(
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DGGML_RPC=ON",
        "-DGGML_NATIVE=OFF",  # runs on any machine of this kind, so a cache may be shared
        "-DGGML_OPENMP=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DLLAMA_USE_PREBUILT_UI=OFF",  # on, the build itself downloads
        "-DLLAMA_SUBPROCESS=OFF",  # removes whatever could spawn a process
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_NUMBER=336",  # else the version is that of any git repository around the cache
        "-DLLAMA_BUILD_COMMIT=sdist0.3.36",
        "-DCMAKE_EXE_LINKER_FLAGS=-static-libstdc++ -static-libgcc",
    ),
    targets=(BINARY, "ggml-rpc-server"),
)


def built_engine(cache_dir: Path, spec: BuildSpec = LLAMA_CPP) -> Path | None:
    """Return the first target of a finished build, None when there is none. Never one that is still being built."""
    path = build_home(cache_dir, spec) / "bin" / spec.targets[0]
    return path if path.is_file() and os.access(path, os.X_OK) else None


def build_home(cache_dir: Path, spec: BuildSpec) -> Path:
    """The directory of a finished build; work in progress is in its siblings."""
    return cache_dir.absolute() / "engine" / spec.key
