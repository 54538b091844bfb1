"""A node list is read strictly, and what is wrong is named with its place."""

import pytest
from sollol.errors import Reason, SollolError
from sollol.report import DeviceKind

from sollold.placement.offline import nodes_from_json


def test_one_number_or_one_for_each_gpu():
    one, several = nodes_from_json(
        '[{"host": "a", "cpu_ram_mb": 1, "gpu_vram_mb": 24000}, {"host": "b", "cpu_ram_mb": 1, "gpu_vram_mb": [8, 16]}]'
    )

    assert [gpu.total_bytes >> 20 for gpu in one.report.devices[1:]] == [24000]
    assert [gpu.total_bytes >> 20 for gpu in several.report.devices[1:]] == [8, 16]


def test_a_gpu_without_known_memory_is_a_gpu():
    (only,) = nodes_from_json('[{"host": "a", "cpu_ram_mb": 1, "gpu_vram_mb": [], "has_gpu": true}]')

    assert [device.kind for device in only.report.devices] == [DeviceKind.CPU, DeviceKind.GPU]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "truncated"),
        ("{}", "array"),
        ('[{"host": "a"}]', r"cpu_ram_mb.*\$\[0\]"),
        ('[{"host": "a", "cpu_ram_mb": -1}]', r"\$\[0\]\.cpu_ram_mb"),
        ('[{"host": "a", "cpu_ram_mb": "1"}]', r"\$\[0\]\.cpu_ram_mb"),
        ('[{"host": "a", "cpu_ram_mb": 1, "gpu_vram_mb": [1, null]}]', r"\$\[0\]\.gpu_vram_mb\[1\]"),
        ('[{"host": "a", "cpu_ram_mb": 1, "ram": 2}]', "unknown field `ram`"),
        ('[{"host": "", "cpu_ram_mb": 1}]', r"\$\[0\]\.host"),
        ('[{"host": "a", "cpu_ram_mb": 1}, {"host": "a", "cpu_ram_mb": 1}]', "'a' is there twice"),
        ('[{"host": "a", "cpu_ram_mb": 1, "gpu_vram_mb": 5, "has_gpu": false}]', "has_gpu false but gpu_vram_mb 5"),
        (b'[{"host": "\xff", "cpu_ram_mb": 1}]', "node list is wrong"),
        ('[{"host": "a", "cpu_ram_mb": 99999999999999999999}]', "node list is wrong"),
    ],
)
def test_a_wrong_list_is_one_clear_refusal(text, complaint):
    with pytest.raises(SollolError, match=complaint) as caught:
        nodes_from_json(text)
    assert Reason.INVALID_REQUEST is caught.value.refusal.reason
