"""The products of a decoding step on a CPU, without an engine around them (after `make demo`; a minute).

    python -m benchmarks.cpu_products [--root .demo]

Every product of the demo's experts runs once a step, behind the base's product of the same shape, which takes the caches
as a step does. Times are of all decoder linears and of lm_head: with slots, and of calls that find no row of a slot.
Threads: one, which is what vLLM's worker has on two cores (`OMP_NUM_THREADS`).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.record import record
from deltamux.compression.checkpoint.architecture import EMBEDDING, tensor_specs
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.image.layout import slot_size
from deltamux.compression.image.source import open_source
from deltamux.serve.worker import native
from deltamux.serve.worker.rows import BASE_ROW, RowMap

ROUNDS = 9
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
MIXES = {
    "no slot, batch 1": [BASE_ROW],
    "batch 1": [0],
    "batch 8": [0] * 8,
    "batch 8, three experts": [0, 1, 2, 0, 1, 2, 0, 1],
}
Seconds = dict[str, float]


class Products:
    """The layers of a base, and its experts in slots."""

    def __init__(self, root: Path) -> None:
        base = open_checkpoint(root / "base")
        specs = tensor_specs(base.config, set(base.files))
        self.shapes = {spec.name: base.shape(spec.name) for spec in specs}
        paths = sorted((root / "compressed").iterdir())[:3]
        images = [open_source(path, 0).image(self.shapes) for path in paths]
        self.slots = native.host_slots(
            len(images), slot_size(max(image.numel() for image in images))
        )
        for slot, image in zip(self.slots, images, strict=True):
            slot[: image.numel()] = image
        self.names = list(self.shapes)
        layers = int(base.config["num_hidden_layers"])
        self.linears = [
            self._layer([f"model.layers.{layer}.{part}.weight" for part in group])
            for layer in range(layers)
            for group in GROUPS
        ]
        self.head = self._layer([EMBEDDING])

    def _layer(self, names: list[str]) -> tuple[Callable[..., None], torch.Tensor]:
        """Its product with slots, and a weight of the base's shape."""
        rows = [self.shapes[name][0] for name in names]
        columns = self.shapes[names[0]][1]
        entries = [self.names.index(name) for name in names]
        add = native.linear_product(self.slots, entries, rows, columns)
        return add, torch.randn(sum(rows), columns).bfloat16()

    def step(self, mix: list[int]) -> Seconds:
        """Seconds of one step's products."""
        rows = RowMap(len(mix), len(self.slots), torch.device("cpu"))
        rows.update(mix)
        spent = dict.fromkeys(("linears", "lm_head", "base"), 0.0)
        for add, weight in [*self.linears, self.head]:
            x = torch.randn(len(mix), weight.shape[1]).bfloat16()
            start = time.perf_counter()
            y = torch.nn.functional.linear(x, weight)
            middle = time.perf_counter()
            add(y, x, rows.order, rows.starts)
            kind = "lm_head" if weight is self.head[1] else "linears"
            spent[kind] += time.perf_counter() - middle
            spent["base"] += middle - start
        return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(".demo"))
    products = Products(parser.parse_args().root.absolute())
    steps: dict[str, list[Seconds]] = {label: [] for label in MIXES}
    for _ in range(ROUNDS):
        for label, mix in MIXES.items():
            steps[label].append(products.step(mix))
    result: dict[str, Any] = {"kernel": native.product_name(), "threads": torch.get_num_threads()}
    for label, rounds in steps.items():
        result[label] = {
            kind: {
                "median": statistics.median(each[kind] for each in rounds),
                "least": min(each[kind] for each in rounds),
                "most": max(each[kind] for each in rounds),
            }
            for kind in rounds[0]
        }
    record("cpu-products", result)


if __name__ == "__main__":
    main()
