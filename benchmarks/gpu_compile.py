"""The GPU's kernels compiled ahead of time for A100 and H100: registers, shared memory, spills.

    python -m benchmarks.gpu_compile

Needs no GPU: ptxas and cuobjdump come with triton. Shapes are Mistral-7B's; occupancy is what
registers and shared memory allow; bytes a weight are counted from the layout.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.record import record
from deltamux.serve.worker import (
    triton_dense,
    triton_digits,
    triton_factors,
    triton_kernel,
    triton_rows,
)
from deltamux.serve.worker.triton_launch import LATENCY, MIDDLE, SINGLE, THROUGHPUT, Tiling

ARCHITECTURES = {80: "A100", 90: "H100"}
REGISTERS, MOST_WARPS, MOST_PROGRAMS = 65536, 64, 32
# Shared memory of a multiprocessor, and what each program needs beside its own.
SHARED = {80: 164 << 10, 90: 228 << 10}
SHARED_EACH = 1 << 10
SLOTS = 16
# Escapes a weight, as measured on an expert of 1 bit a weight on disk.
ESCAPES = 0.007
POINTERS = {
    "y": "*bf16", "x": "*bf16", "out": "*bf16", "base": "*bf16", "bias": "*bf16",
    "bias_out": "*bf16", "digits": "*i8", "levels": "*i16", "columns": "*i16", "meta": "*fp32",
    "h": "*fp32", "order": "*i32", "starts": "*i32", "room": "*i32", "slot_of_row": "*i32", "ids": "*i64",
    "slots": "*u8",
}  # fmt: skip
STRIDES = {"slot_bytes": "i64", "y_stride": "i32", "x_stride": "i32"}
SLICES = {"N0": 4096, "N1": 1024, "N2": 1024, "N3": 0}
SHARED_CONSTANTS = {"SLOTS": SLOTS, "SLOTS_WIDTH": SLOTS}


@dataclass(frozen=True)
class Kernel:
    """A kernel with its constants, as it is launched."""

    name: str
    function: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    registers: int | None = None


@dataclass(frozen=True)
class Compiled:
    """What ptxas made of a kernel."""

    kernel: str
    device: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    warps: int
    programs: int
    occupancy: float


def product(name: str, cut: Tiling, columns: int, many: bool, early: bool) -> Kernel:
    constants = SLICES | SHARED_CONSTANTS | {
        "K": columns, "BN": cut.rows, "BB": cut.bytes, "UNROLL": cut.unroll, "SPLIT": cut.split,
        "STAGES": cut.stages, "WIDTH": cut.width, "BB_MANY": cut.bytes_many,
        "STAGES_MANY": cut.stages_many, "WIDTH_MANY": cut.width_many, "MANY": many,
        "MAPPED": False, "FETCH": cut.fetch, "ASSEMBLY": True, "WAIT": early,
        "HALVINGS": cut.halvings if many else 0,
    }  # fmt: skip
    return Kernel(name, triton_kernel.product_kernel, constants, cut.warps, registers=cut.registers)


def kernels(architecture: int) -> Iterator[Kernel]:
    early = architecture >= 90
    for columns in (4096, 14336):
        for name, cut, many in (
            ("one row, small", LATENCY, False),
            ("one row", SINGLE, False),
            ("rows, small", MIDDLE, True),
            ("rows", THROUGHPUT, True),
        ):
            yield product(f"product, {name}, K {columns}", cut, columns, many, early)
        constants = SHARED_CONSTANTS | {
            "K": columns, "BYTES": columns // 4, "BLOCK": triton.next_power_of_2(columns),
            "CHUNK": triton_digits.CHUNK, "SINGLE": False, "EARLY": early,
        }  # fmt: skip
        warps = triton_digits.warps_for(columns)
        yield Kernel(f"digits, K {columns}", triton_digits.digits_kernel, constants, warps)
    merge = {
        "K": 4096, "BN": 4, "BK": 1024, "WIDTH": 32, "MAPPED": False, "HAS_BASE": True,
        "HAS_BIAS": True, "HAS_RANK": False,
    }  # fmt: skip
    yield Kernel("merged weight", triton_dense.dense_kernel, merge, 4)
    table = {"K": 4096, "BK": 1024, "MAPPED": True}
    yield Kernel("embedding", triton_rows.embedding_kernel, table, 4)
    yield Kernel("norm", triton_rows.norm_kernel, {"H": 4096, "BH": 4096}, 8)
    rank = {"SLICES": 3, "MOST_RANK": 64}
    right = SHARED_CONSTANTS | rank | {"K": 4096}
    yield Kernel("factors, right", triton_factors.right_kernel, right, 4)
    left = SHARED_CONSTANTS | rank | SLICES | {"BN": 64}
    yield Kernel("factors, left", triton_factors.left_kernel, left, 4)


def make(kernel: Kernel, architecture: int) -> Any:
    """Compile a kernel; a compiler's error is let through."""
    names: list[str] = list(kernel.function.arg_names)
    signature = {}
    for name in names:
        plain = POINTERS.get(name) or STRIDES.get(name) or "i32"
        signature[name] = "constexpr" if name in kernel.constants else plain
    if "epsilon" in signature:
        signature["epsilon"] = "fp32"
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name in POINTERS or name in STRIDES
    }
    source = ASTSource(kernel.function, signature, kernel.constants, aligned)
    options = {
        "num_warps": kernel.warps,
        "num_stages": kernel.stages,
        "enable_fp_fusion": True,
        "maxnreg": kernel.registers,
    }
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compiled(kernel: Kernel, architecture: int) -> Compiled:
    """What ptxas made of a kernel."""
    made = make(kernel, architecture)
    usage = resource_usage(made.asm["cubin"])
    shared = int(made.metadata.shared)
    programs = resident(usage["REG"], shared, kernel.warps, architecture)
    return Compiled(
        kernel.name, ARCHITECTURES[architecture], usage["REG"], usage["STACK"], usage["LOCAL"],
        shared, kernel.warps, programs, programs * kernel.warps / MOST_WARPS,
    )  # fmt: skip


def resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def resident(registers: int, shared: int, warps: int, architecture: int) -> int:
    """Programs that a multiprocessor holds at once."""
    each_warp = -(-registers // 8) * 8 * 32
    return min(
        REGISTERS // each_warp // warps,
        SHARED[architecture] // (shared + SHARED_EACH),
        MOST_WARPS // warps,
        MOST_PROGRAMS,
    )


def bytes_per_weight() -> dict[str, float]:
    """Read once a step for each active expert."""
    return {"plane": 0.25, "escapes": 2 * ESCAPES, "starts of escapes": 4 / 4096}


def main() -> None:
    found = [
        compiled(kernel, architecture)
        for architecture in ARCHITECTURES
        for kernel in kernels(architecture)
    ]
    print(f"{'kernel':36}{'device':8}{'registers':>10}{'spilled':>9}{'shared':>9}{'warps':>7}")
    for each in found:
        spilled = each.stack_bytes + each.local_bytes
        print(
            f"{each.kernel:36}{each.device:8}{each.registers:10}{spilled:9}{each.shared_bytes:9}"
            f"{each.programs * each.warps:5}/64"
        )
    weights = bytes_per_weight()
    print(f"bytes a weight: {sum(weights.values()):.4f}")
    result = {"kernels": [asdict(each) for each in found], "bytes_per_weight": weights}
    record("gpu-compile", result | {"triton": triton.__version__})


if __name__ == "__main__":
    main()
