"""Every architecture in a real engine: base and expert in one batch, against transformers on the merged weights."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import architectures

pytestmark = pytest.mark.vllm

# float32 throughout; the engine multiplies base and delta separately, transformers their sum.
TOLERANCE = 2e-4
# `test_engine.py` has these with more experts, prompts and steps.
ELSEWHERE = ("llama", "qwen2", "qwen3")
# vLLM 0.32 and transformers differ by 0.15 for the base alone, whose queries are scaled with YaRN.
DIFFERENT_IN_VLLM = ("ministral3",)


@pytest.mark.parametrize(
    "model_type",
    sorted({*architectures.SERVED_TYPES} - {*ELSEWHERE, *DIFFERENT_IN_VLLM}),
)
def test_served_logprobs_match_transformers_on_the_merged_weights(
    tmp_path: Path, checkpoints: SimpleNamespace, text_file: Path, model_type: str
) -> None:
    architectures.prepare(tmp_path, model_type, checkpoints, text_file)
    found = architectures.differences(tmp_path)
    assert found["expert"] < TOLERANCE
    assert found["base"] < TOLERANCE
    # And there was something to be served.
    assert found["expert_to_base"] > 0.1
