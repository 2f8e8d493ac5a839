"""What nvidia-smi prints, read."""

from pathlib import Path

import pytest

from sparsecast.workers import nvidia

LIST = """\
0, GPU-aaaa, 580.95.05
1, GPU-bbbb, 580.95.05
"""
#: As on a host with NICs: underlined header, more columns than GPUs, a legend.
TOPO = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPIX\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n  SYS  = Connection\n"
)


def test_drivers_and_links_are_read_by_uuid() -> None:
    """Two GPUs over NVLink: both directions, by UUID, since torch may count them otherwise."""
    drivers, uuids = nvidia.parse_list(LIST)
    assert drivers == {"GPU-aaaa": "580.95.05", "GPU-bbbb": "580.95.05"}
    assert nvidia.parse_links(TOPO, uuids) == {
        ("GPU-aaaa", "GPU-bbbb"): "NV18",
        ("GPU-bbbb", "GPU-aaaa"): "NV18",
    }


def test_garbage_is_nothing() -> None:
    """An error message in place of a table is no GPU and no link."""
    assert nvidia.parse_list("No devices were found\n") == ({}, {})
    assert nvidia.parse_links("NVIDIA-SMI has failed, because …\n", {0: "GPU-a"}) == {}


def test_a_machine_without_nvidia_smi_has_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No such program on the PATH: an empty answer, not an error."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.ask() == nvidia.Smi()
