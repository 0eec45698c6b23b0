"""Tensor parallelism on a real engine of two CPU ranks, held against one rank."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.rows import read_rows
from deltamux.compression.streaming.text import encode_rows
from tests.serve.test_engine import PROMPT, SHORT, TOLERANCE, run_engine

pytestmark = pytest.mark.vllm

# Heads of 64, which vLLM's CPU attention wants on more than one rank.
HEADS = {"hidden_size": 128, "head_dim": 64}
# Biases; tied embeddings and norms of heads; q, k and v in one matrix; one head of keys for two ranks.
MODELS = {
    "qwen2": ("qwen2", False, HEADS),
    "qwen3, tied": ("qwen3", True, HEADS),
    "phi3": ("phi3", False, {"hidden_size": 256, "pad_token_id": 0}),
    "one head of keys": ("llama", False, HEADS | {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_one_says(
    name: str, tmp_path: Path, checkpoints: SimpleNamespace, text_file: Path
) -> None:
    model_type, tied, overrides = MODELS[name]
    base = checkpoints.save_base(tmp_path / "base", model_type, tied, **overrides)
    artifacts = {}
    for seed, expert in enumerate(("one", "two"), start=1):
        tuned = checkpoints.save_expert(base, tmp_path / f"tuned-{expert}", seed)
        samples = encode_rows(read_rows(text_file), tuned, 128)
        pair = open_checkpoint(base), open_checkpoint(tuned)
        folder = tmp_path / expert
        compress(*pair, folder, Recipe(), calibration=samples, held_out=[], progress=False)
        artifacts[expert] = str(folder)
    batch = [["one", PROMPT], [None, PROMPT], ["two", SHORT], ["one", SHORT]]
    one, two = (
        run_engine(tmp_path, base, True, artifacts, [batch], tensor_parallel_size=ranks)[0]
        for ranks in (1, 2)
    )
    assert len({tuple(answer["prompt_logprobs"][:8]) for answer in two}) == len(batch)
    for alone, shared in zip(one, two, strict=True):
        torch.testing.assert_close(
            torch.tensor(shared["prompt_logprobs"]),
            torch.tensor(alone["prompt_logprobs"]),
            atol=TOLERANCE,
            rtol=0,
        )
