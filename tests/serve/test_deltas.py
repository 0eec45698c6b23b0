"""Hooks behind vLLM's own layers: what they add, and that compilers see one graph."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from deltamux.compression.checkpoint.architecture import EMBEDDING, FINAL_NORM
from deltamux.compression.image.layout import assemble
from deltamux.compression.image.weights import adapter_record, vector_record
from deltamux.serve.worker.ops import define_ops
from deltamux.serve.worker.rows import RowMap
from deltamux.serve.worker.slots import Slots

pytestmark = pytest.mark.vllm

HIDDEN, VOCABULARY = 32, 64
DOWN = "model.layers.0.mlp.down_proj.weight"
NAMES = [EMBEDDING, DOWN, FINAL_NORM]


class Decoder(torch.nn.Module):
    """vLLM's layers, one of each kind that experts change, wired as in its decoders."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self) -> None:
        from vllm.model_executor.layers.layernorm import RMSNorm
        from vllm.model_executor.layers.linear import ReplicatedLinear
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.down_proj = ReplicatedLinear(HIDDEN, HIDDEN, bias=False)
        self.model.layers = torch.nn.ModuleList([layer])
        self.model.norm = RMSNorm(HIDDEN, eps=1e-6)
        self.logits_processor = LogitsProcessor(VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.embed_tokens(ids)
        hidden, _ = self.model.layers[0].mlp.down_proj(hidden)
        normed: torch.Tensor = self.model.norm(hidden)
        return normed


@pytest.fixture
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        torch.manual_seed(0)
        made = Decoder()
        for parameter in made.parameters():
            parameter.data.normal_()
        for module in made.modules():
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)
        yield made
        cleanup_dist_env_and_memory()


def hooked(decoder: Decoder, direct: bool) -> Any:
    from deltamux.serve.worker.deltas import Hooks, Rows, hook_model

    define_ops()
    cpu = torch.device("cpu")
    slots = Slots(2, 2**16, NAMES, cpu)
    torch.manual_seed(1)
    records = {
        1: adapter_record(torch.randn(3, HIDDEN), torch.randn(HIDDEN, 3)),
        2: vector_record(torch.rand(HIDDEN)),
    }
    slots.load(1, assemble(records, len(NAMES)))
    rows = Rows(RowMap(8, 2, cpu), RowMap(8, 2, cpu))
    hook_model(decoder, Hooks(slots, rows, frozenset({FINAL_NORM}), direct, tied=True))
    return rows


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "op"])
def test_only_rows_of_slots_change(decoder: Decoder, direct: bool) -> None:
    ids = torch.tensor([3, 5, 7])
    plain = decoder(ids)
    rows = hooked(decoder, direct)
    rows.tokens.update([-1, -1, -1])
    assert torch.equal(decoder(ids), plain)
    rows.tokens.update([-1, 1, 0])
    mixed = decoder(ids)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[2], plain[2])
    assert not torch.allclose(mixed[1], plain[1], atol=0.1)


def test_a_hooked_model_is_one_graph_that_follows_the_batch(decoder: Decoder) -> None:
    ids = torch.tensor([3, 5, 7])
    rows = hooked(decoder, direct=False)
    rows.tokens.update([-1, 1, 0])
    expected = decoder(ids)
    compiled = torch.compile(decoder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), expected)
    rows.tokens.update([1, 1, -1])
    torch.testing.assert_close(compiled(ids), decoder(ids))
