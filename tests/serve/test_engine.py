"""A real vLLM CPU engine against itself and against transformers.

Each engine runs in a process of its own (`engine_runner.py`); the expected values are transformers'
logits of the merged checkpoints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.compress import compress
from deltamux.compression.recipe import Recipe
from deltamux.compression.streaming.rows import read_rows
from deltamux.compression.streaming.text import encode_rows

pytestmark = pytest.mark.vllm

NAMES = ("one", "two", "three")
MODELS = [("llama", False), ("qwen2", False), ("qwen3", True)]
SLOTS = 2
PROMPT = "how many apples are left when three of eleven are eaten? " * 3
SHORT = "add 3 and 4"
# float32 throughout; the engine multiplies base and delta separately, transformers their sum.
TOLERANCE = 2e-4

Results = list[list[dict[str, Any]]]


def run_engine(
    folder: Path,
    model: Path,
    plugin: bool,
    experts: dict[str, str],
    batches: Any,
    **vllm: Any,
) -> Results:
    job = folder / "job.json"
    output = folder / "results.json"
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "plugin": plugin,
                "slots": SLOTS,
                "experts": experts,
                "batches": batches,
                "output": str(output),
            }
            | vllm
        )
    )
    runner = Path(__file__).with_name("engine_runner.py")
    done = subprocess.run(
        [sys.executable, str(runner), str(job)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert output.is_file(), done.stderr[-3000:]
    results: Results = json.loads(output.read_text())
    return results


class Served:
    """One architecture: base, merged experts and what the engine said."""

    def __init__(
        self, folder: Path, make: SimpleNamespace, model_type: str, tied: bool, text: Path
    ) -> None:
        self.base = make.save_base(folder / "base", model_type, tied)
        self.artifacts: dict[str, str] = {}
        self.merged: dict[str | None, Path] = {None: self.base}
        for seed, name in enumerate(NAMES, start=1):
            tuned = make.save_expert(self.base, folder / f"tuned-{name}", seed)
            samples = encode_rows(read_rows(text), tuned, 128)
            pair = open_checkpoint(self.base), open_checkpoint(tuned)
            compress(
                *pair, folder / name, Recipe(), calibration=samples, held_out=[], progress=False
            )
            merge(pair[0], Artifact(folder / name), folder / f"merged-{name}", progress=False)
            self.artifacts[name] = str(folder / name)
            self.merged[name] = folder / f"merged-{name}"
        self.mixed_order: list[str | None] = ["one", None, "two", "one", "three", None]
        mixed = [[name, PROMPT] for name in self.mixed_order]
        alone = [[[name, PROMPT]] for name in (*NAMES, None)]
        different = [[[name, f"{SHORT} {i}"] for i, name in enumerate(self.mixed_order)]]
        batches = [mixed, *alone, *different]
        results = run_engine(folder, self.base, True, self.artifacts, batches)
        self.mixed, self.different = results[0], results[5]
        self.alone = dict(zip((*NAMES, None), (batch[0] for batch in results[1:5]), strict=True))
        self.folder = folder


@pytest.fixture(scope="module", params=MODELS, ids=lambda p: p[0])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: SimpleNamespace,
    text_file: Path,
) -> Served:
    model_type, tied = request.param
    folder = tmp_path_factory.mktemp(f"engine-{model_type}")
    return Served(folder, checkpoints, model_type, tied, text_file)


def transformers_logprobs(checkpoint: Path, ids: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)


def same_until_a_tie(one: dict[str, Any], other: dict[str, Any]) -> bool:
    for left, right, gap in zip(one["ids"], other["ids"], one["gaps"], strict=False):
        if left != right:
            return bool(gap < TOLERANCE)
    return True


def test_greedy_tokens_in_a_mixed_batch_equal_those_alone(served: Served) -> None:
    for name, answer in zip(served.mixed_order, served.mixed, strict=True):
        assert same_until_a_tie(answer, served.alone[name]), name


def test_experts_answer_differently_from_the_base_and_from_each_other(served: Served) -> None:
    answers = {tuple(answer["ids"]) for answer in served.alone.values()}
    assert len(answers) == len(NAMES) + 1


@pytest.mark.parametrize("kind", ["mixed", "different"])
def test_logprobs_match_transformers_on_the_merged_weights(served: Served, kind: str) -> None:
    for name, answer in zip(served.mixed_order, getattr(served, kind), strict=True):
        logprobs = transformers_logprobs(served.merged[name], answer["prompt_ids"] + answer["ids"])
        start = len(answer["prompt_ids"]) - 1
        expected = [float(logprobs[start + i, token]) for i, token in enumerate(answer["ids"])]
        torch.testing.assert_close(
            torch.tensor(answer["logprobs"]), torch.tensor(expected), atol=TOLERANCE, rtol=0
        )


def test_prompt_logprobs_match_transformers_on_the_merged_weights(served: Served) -> None:
    for name, answer in zip(served.mixed_order, served.different, strict=True):
        ids = answer["prompt_ids"]
        logprobs = transformers_logprobs(served.merged[name], ids)
        expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
        torch.testing.assert_close(
            torch.tensor(answer["prompt_logprobs"]), torch.tensor(expected), atol=TOLERANCE, rtol=0
        )


def test_base_requests_are_bit_identical_with_and_without_the_plugin(
    tmp_path: Path, served: Served
) -> None:
    plain = run_engine(tmp_path, served.base, False, {}, [[[None, PROMPT]]])[0][0]
    with_plugin = served.alone[None]
    assert plain["ids"] == with_plugin["ids"]
    assert plain["logprobs"] == with_plugin["logprobs"]
    assert plain["prompt_logprobs"] == with_plugin["prompt_logprobs"]


@pytest.mark.parametrize("served", MODELS[:1], indirect=True, ids=lambda p: p[0])
def test_a_base_that_vllm_quantizes_is_untouched_and_loses_its_experts_no_more_than_itself(
    tmp_path: Path, served: Served
) -> None:
    short = {"dtype": "bfloat16", "quantization": "fp8_per_channel"}
    asked = [[[None, PROMPT]], [["one", PROMPT]], [["one", PROMPT], [None, PROMPT]]]
    plain = run_engine(tmp_path, served.base, False, {}, asked[:1], **short)[0][0]
    base, expert, mixed = run_engine(tmp_path, served.base, True, served.artifacts, asked, **short)
    assert base[0]["ids"] == plain["ids"]
    assert base[0]["prompt_logprobs"] == plain["prompt_logprobs"]

    def away(name: str | None, answer: dict[str, Any]) -> float:
        whole = torch.tensor(transformers_prompt(served.merged[name], answer["prompt_ids"]))
        return float((torch.tensor(answer["prompt_logprobs"]) - whole).abs().mean())

    # It was quantized, and the delta stands on the quantized weights as on the whole ones.
    assert away(None, base[0]) > 10 * TOLERANCE
    for answer in (expert[0], mixed[0]):
        assert away("one", answer) < 2 * away(None, base[0])
    assert away("one", base[0]) > 3 * away("one", expert[0])


def transformers_prompt(checkpoint: Path, ids: list[int]) -> list[float]:
    logprobs = transformers_logprobs(checkpoint, ids)
    return [float(logprobs[place, token]) for place, token in enumerate(ids[1:])]


@pytest.mark.parametrize("served", MODELS[:1], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafted_tokens_change_no_experts_answer(
    tmp_path: Path, served: Served, method: str
) -> None:
    drafting: dict[str, Any] = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        drafting |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        drafting["model"] = str(served.base)
    mixed = [[name, PROMPT] for name in served.mixed_order]
    answers, counts = run_engine(
        tmp_path, served.base, True, served.artifacts, [mixed], speculative=drafting
    )
    for name, answer in zip(served.mixed_order, answers, strict=True):
        assert same_until_a_tie(served.alone[name], answer), name
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
