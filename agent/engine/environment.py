"""The environment engine processes get: built from scratch, never inherited.

llama-server reads every one of its options from `LLAMA_ARG_*` too (`LLAMA_ARG_TOOLS=all` would open a shell over HTTP),
so a variable that is not listed here does not reach it.
"""

from collections.abc import Mapping

_KEPT = (
    "PATH",
    "HOME",
    "LANG",
    "TMPDIR",
    # Where the loader finds the libraries of a GPU build that is not linked with an rpath.
    "LD_LIBRARY_PATH",
    # Which GPUs are visible, and in which order: what we measured must be what the engine sees.
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "HSA_OVERRIDE_GFX_VERSION",
    "ONEAPI_DEVICE_SELECTOR",
    "ZE_AFFINITY_MASK",
    "GGML_VK_VISIBLE_DEVICES",
)

_DEFAULTS = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}

_ALWAYS = {
    # An abort would call gdb for a backtrace and take half a second more to end.
    "GGML_NO_BACKTRACE": "1",
    # Huge pages for large allocations, which the system gives to those that ask. A backend's weights lie there: 180 MiB
    # of them took 17 ms to read instead of 23, and 15 MiB of memory more. Ignored by other C libraries and old ones.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def engine_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for an engine process started from a process whose own environment is `base`."""
    return _DEFAULTS | {name: base[name] for name in _KEPT if name in base} | _ALWAYS
