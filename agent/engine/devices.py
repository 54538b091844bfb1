"""Reads what an engine says of itself: its version line and its list of devices. Pure."""

import re

from msgspec import Struct

_MIB = 1 << 20
_DEVICE = re.compile(
    r"^  (?P<id>[^\s:]+): (?P<description>.*) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)\s*$", re.MULTILINE
)


class EngineDevice(Struct, frozen=True, kw_only=True):
    """A device that layers can be offloaded to, under the engine's own name (`CUDA0`). The CPU is never one."""

    device_id: str
    description: str
    total_bytes: int
    free_bytes: int


def parse_devices(listing: str) -> tuple[EngineDevice, ...]:
    """Read the output of `--list-devices`, in the engine's order. Lines of any other form are skipped."""
    return tuple(
        EngineDevice(
            device_id=found["id"],
            description=found["description"],
            total_bytes=int(found["total"]) * _MIB,
            free_bytes=int(found["free"]) * _MIB,
        )
        for found in _DEVICE.finditer(listing)
        if found["id"] != "CPU"
    )


def parse_build(version: str) -> str:
    """Return the first line of `--version` without its label; empty when it is not there."""
    return next((line.removeprefix("version:").strip() for line in version.splitlines() if "version:" in line), "")
