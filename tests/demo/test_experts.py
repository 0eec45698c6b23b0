import math

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltamux.serve.demo import batches as demo_batches
from deltamux.serve.demo.data import Example
from deltamux.serve.demo.experts import held_out_loss, rate_share, train_expert

WORDS = (
    "<unk>", "<pad>", "<s>", "</s>", "user", "assistant", "red", "green", "blue", "is", "one",
    "two", "three", "four",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
EXAMPLES = [
    Example("red is", "one one"),
    Example("green is", "two"),
    Example("blue is", "three three three"),
    Example("is red", "one one"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama of a few thousand weights in bf16, with a tokenizer of whole words."""
    path = tmp_path_factory.mktemp("tiny") / "base"
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=2, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def train(base, target, **changes):
    settings = {"steps": 30, "batch_size": 2, "learning_rate": 1e-2, "progress": False}
    return train_expert(base, EXAMPLES, target, **(settings | changes))


def test_training_lowers_the_loss_and_reports_it(base, tmp_path):
    report = train(base, tmp_path / "expert")
    before = held_out_loss(base, EXAMPLES)
    assert before == pytest.approx(math.log(len(WORDS)), abs=0.7)  # a random model knows nothing
    assert held_out_loss(tmp_path / "expert", EXAMPLES) < 0.3 * before
    assert report.steps == 30
    assert report.last_loss < report.first_loss
    assert report.changed_share > 0.5
    assert 0 < report.seconds_per_step * 30 <= report.seconds


def test_an_expert_is_a_checkpoint_like_its_base(base, tmp_path):
    train(base, tmp_path / "expert", steps=2)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "expert").iterdir()} == names
    old, new = (load_file(path / "model.safetensors") for path in (base, tmp_path / "expert"))
    assert {k: (v.shape, v.dtype) for k, v in new.items()} == {
        k: (v.shape, v.dtype) for k, v in old.items()
    }
    assert "lm_head.weight" not in new
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "expert" / name).read_text() == (base / name).read_text()


def test_the_same_seed_gives_the_same_expert(base, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(base, tmp_path / name, steps=3, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_running_the_shared_prefix_once_changes_neither_loss_nor_gradient(base):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    encoded = demo_batches.encode(AutoTokenizer.from_pretrained(base), EXAMPLES)
    results = []
    for prefix_length in (demo_batches.shared_prefix_length(encoded), 0):
        model.zero_grad()
        loss = demo_batches.response_loss(model, demo_batches.collate(encoded, prefix_length))
        loss.sum().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        results.append((loss.detach(), gradient.clone()))
    assert demo_batches.shared_prefix_length(encoded) == 2  # "<s> user"
    # Two orders of summation in float32.
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_model_s_own_over_response_tokens(base):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    (one,) = demo_batches.encode(AutoTokenizer.from_pretrained(base), EXAMPLES[:1])
    assert [WORDS[i] for i in one.ids[one.response_start :]] == ["one", "one", "</s>"]
    ids = torch.tensor([one.ids])
    labels = ids.clone()
    labels[:, : one.response_start] = -100
    expected = model(input_ids=ids, labels=labels).loss.item()
    assert held_out_loss(base, EXAMPLES[:1]) == pytest.approx(expected, rel=1e-5)


def test_batches_use_every_example_before_any_returns(base):
    encoded = demo_batches.encode(AutoTokenizer.from_pretrained(base), EXAMPLES)
    batches = list(demo_batches.shuffled(encoded, 2, steps=4, seed=0))
    for epoch in (batches[:2], batches[2:]):
        assert sum((batch.labels_BT >= 0).sum() for batch in epoch) == 12


def test_the_rate_warms_up_and_decays():
    shares = [rate_share(step, 40) for step in range(40)]
    assert shares[0] == 0.25
    assert max(shares) == shares[3] == 1.0
    assert shares[3:] == sorted(shares[3:], reverse=True)
    assert shares[-1] == pytest.approx(0.05)
    assert rate_share(0, 1) == 1.0


def test_settings_without_sense_are_refused_before_loading(tmp_path):
    with pytest.raises(ValueError, match="must be positive, got 0 and 2"):
        train(tmp_path / "missing", tmp_path / "expert", steps=0)


def test_no_examples_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match="must not be empty"):
        held_out_loss(base, [])


def test_a_template_that_rewrites_its_prompt_is_refused(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="another text for 'red is'"):
        demo_batches.encode(tokenizer, EXAMPLES)
