"""The GPU's kernels compiled for A100 and H100, on a machine that has neither."""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from benchmarks import gpu_compile  # noqa: E402
from deltamux.serve.worker.triton_launch import LATENCY  # noqa: E402

ARCHITECTURES = [80, 90]


def one_row(architecture: int) -> gpu_compile.Kernel:
    early = architecture >= 90
    return gpu_compile.product("one row", LATENCY, 4096, many=False, early=early)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def ptx(request: Any) -> str:
    return str(gpu_compile.make(one_row(request.param), request.param).asm["ptx"])


def test_planes_are_read_16_bytes_at_a_time(ptx: str) -> None:
    assert "cp.async.cg.shared.global" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (0x10|16),", ptx)


def test_codes_meet_tensor_cores_after_one_mask(ptx: str) -> None:
    assert "mma.sync.aligned.m16n8k32.row.col" in ptx
    assert "0x03030303" in ptx or "50529027" in ptx


def test_bytes_a_weight_are_those_of_planes_escapes_and_starts() -> None:
    assert sum(gpu_compile.bytes_per_weight().values()) == pytest.approx(0.265, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(architecture: int) -> None:
    for kernel in gpu_compile.kernels(architecture):
        found = gpu_compile.compiled(kernel, architecture)
        assert found.stack_bytes + found.local_bytes == 0, found
        assert found.programs >= 2, found
