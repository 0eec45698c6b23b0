"""The GPU's products in Triton's interpreter, against dense matrices; what is decided where they cannot run."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
# One place of the last bit: the interpreter cuts off what does not fit, a GPU rounds.
LAST_PLACE = {"float16": 2**-10, "float32": 2**-15}
BFLOAT16 = 2**-7
# Factors are added by a launch of their own: y is rounded twice.
ROUNDINGS = {
    "factors in bfloat16": 2,
    "factors in float32": 2,
    "coded factors": 2,
    # Unit, weight and their product are rounded, as vLLM does.
    "norms": 3,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    """What `triton_cases.py` found, by case."""
    pytest.importorskip("triton")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_cases.py")
    run = subprocess.run(
        [sys.executable, str(cases)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {each["case"]: each for each in found}


def test_products_are_those_of_the_dense_deltas(outcomes: dict[str, dict[str, Any]]) -> None:
    errors = {name: each["error"] for name, each in outcomes.items() if "error" in each}
    assert len(errors) >= 30
    for name, error in errors.items():
        assert error <= LAST_PLACE.get(name, BFLOAT16) * ROUNDINGS.get(name, 1), name


def test_rows_of_the_base_keep_their_bits(outcomes: dict[str, dict[str, Any]]) -> None:
    kept = {name: each["kept"] for name, each in outcomes.items() if "kept" in each}
    assert all(kept.values()), kept


def test_a_rows_result_does_not_depend_on_its_batch_or_on_tilings(
    outcomes: dict[str, dict[str, Any]],
) -> None:
    assert outcomes["same_whatever_the_batch"]["same"]


class Reads(TorchDispatchMode):
    """Notes the torch ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


class NoKernel:
    """Stands for a kernel: takes a grid and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(each, int) for each in grid)
        return lambda *args, **kwargs: None


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from deltamux.serve.worker import triton_digits, triton_factors, triton_launch, triton_rows

    for module, names in (
        (triton_digits, ["digits_kernel"]),
        (triton_factors, ["right_kernel", "left_kernel"]),
        (triton_launch, ["product_kernel"]),
        (triton_rows, ["embedding_kernel", "norm_kernel"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, NoKernel())


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("rows", [1, 16, 2000])
def test_launches_ask_the_device_for_nothing_but_memory(rows: int) -> None:
    from deltamux.serve.worker.triton_launch import Capabilities, launch_product
    from deltamux.serve.worker.triton_parts import room_for_sums
    from deltamux.serve.worker.triton_rows import launch_embedding, launch_norm

    # Made once, by the trial before any graph is captured.
    room_for_sums(torch.device("cpu"))
    slots = torch.zeros(4, 1024, dtype=torch.uint8)
    x = torch.zeros(rows, 64, dtype=torch.bfloat16)
    index, starts = torch.zeros(rows, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
    with Reads() as reads:
        launch_product(
            x, x, index, index, starts, slots, (0, 1), (48, 16), 16, False, Capabilities(True, True)
        )
        launch_embedding(x, index, index, slots, 0, 64)
        launch_norm(x, x, index, slots, 0, 1e-5)
    views = {"aten.view.default", "aten._unsafe_view.default"}
    assert reads.names <= {"aten.empty.memory_format", "aten.new_empty.default"} | views


def test_without_a_gpu_products_run_in_torch_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deltamux.serve.worker import triton_product

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_product.usable.cache_clear()
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING, triton_product.logger.name):
        assert not triton_product.usable(device)
        assert not triton_product.usable(device)
    assert [each.message for each in caplog.records if "run in torch" in each.message] == [
        "products of slots run in torch, without CUDA graphs and slowly: slots are on cpu"
    ]
    triton_product.usable.cache_clear()


def test_torch_does_what_the_kernels_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu_images import Matrix, dense, pack, random_escapes, random_plane
    from deltamux.serve.worker import triton_product

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    generator = torch.Generator().manual_seed(0)
    matrix = Matrix(24, 70, [random_plane(24, 70, generator)], 1.0, 0.01)
    matrix.escapes = random_escapes(24, 70, 0.05, generator)
    norm = Matrix(70, 70, vector=torch.randn(70, generator=generator))
    image = pack([matrix, norm])
    slots = torch.stack([image, torch.zeros_like(image)])
    slot_of_row = torch.tensor([0, -1, 1, 0])
    order, starts = torch.tensor([1, 0, 3, 2]), torch.tensor([1, 3, 4])
    delta, x = dense(matrix), torch.randn(4, 70, generator=generator)
    where = slot_of_row, order, starts
    y = torch.zeros(4, 24)
    triton_product.add_linear(y, x, *where, slots, [0], [24], 0, False)
    torch.testing.assert_close(y[[0, 3]], x[[0, 3]] @ delta.T)
    assert not y[[1, 2]].any()
    weight = torch.randn(24, 70, generator=generator)
    both = triton_product.linear(x, weight, None, *where, starts, slots, [0], [24], 0)
    torch.testing.assert_close(both, x @ weight.T + y)
    ids, rows = torch.tensor([3, 3, 3, 30]), torch.zeros(4, 70)
    triton_product.add_embedding(rows, ids, slot_of_row, slots, 0, 24)
    torch.testing.assert_close(rows[0], delta[3])
    assert not rows[1:].any()
    normed = torch.zeros(4, 70)
    triton_product.replace_norm(normed, x, slot_of_row, slots, 1, 1e-5)
    unit = torch.nn.functional.rms_norm(x, (70,), norm.vector, 1e-5)
    torch.testing.assert_close(normed[[0, 3]], unit[[0, 3]])
    assert not normed[[1, 2]].any()
    triton_product.usable.cache_clear()


def test_old_devices_and_old_tritons_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from deltamux.serve.worker import triton_product

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device = torch.device("cuda", 0)
    assert triton_product._obstacle(device) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    assert triton_product._obstacle(device) == "triton 3.1.0 is older than 3.4"


def test_a_kernel_that_does_not_compile_leaves_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from deltamux.serve.worker import triton_product

    def fail(_: torch.device) -> None:
        raise RuntimeError("ptxas died\nwith a long story")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(triton_product, "_trial", fail)
    reason = triton_product._obstacle(torch.device("cuda", 0))
    assert reason == "a kernel failed: ptxas died"
