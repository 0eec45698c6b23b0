import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltamux.compression.checkpoint.architecture import EMBEDDING, LM_HEAD, MODEL_TYPES, Role
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.checkpoint.delta import compare

IDS = torch.arange(48).view(2, 24) * 5 % 272
NORM = "model.layers.0.input_layernorm.weight"
HEAD = "lm_head.weight"
LINEAR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copies(make_pair, tmp_path):
    """A pair that a test may change."""

    def copy(model_type="llama", tied=False):
        return tuple(
            shutil.copytree(root, tmp_path / name)
            for root, name in zip(make_pair(model_type, tied), ("base", "expert"), strict=True)
        )

    return copy


def edit_config(root, *removed, **changes):
    path = root / "config.json"
    config = json.loads(path.read_text())
    for key in removed:
        del config[key]
    path.write_text(json.dumps(config | changes))


def edit_weights(root, change):
    path = root / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def compare_roots(pair):
    return compare(*(open_checkpoint(root) for root in pair))


@torch.no_grad()
def logits(root, replace_weights=None):
    """Logits of transformers' own model in float64, over other weights where given."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        if replace_weights:
            save_file(replace_weights, Path(folder) / "model.safetensors")
            shutil.copy(root / "config.json", folder)
            root = folder
        # Other kernels know no soft caps, and no float64.
        model = AutoModelForCausalLM.from_pretrained(
            root,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        return model(IDS).logits


def served_weights(difference):
    """The base's weights plus the deltas, as a server applies them."""
    base, expert = difference.base, difference.expert
    weights = {}
    for spec in difference.specs:
        weights[spec.name] = base.load(spec.name).double()
        if spec.role is not Role.NORM:
            weights[spec.name] += difference.delta(spec)
        elif spec.name in difference.replaced:
            weights[spec.name] = expert.load(spec.name).double()
    return weights


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_base_plus_delta_with_the_base_norms_computes_as_the_expert(make_pair, model_type, tied):
    pair = make_pair(model_type, tied)
    difference = compare_roots(pair)
    # The ratio and the difference are rounded to float32: 2^-23 of a weight, a few layers deep.
    torch.testing.assert_close(
        logits(pair[0], served_weights(difference)), logits(pair[1]), rtol=1e-5, atol=1e-5
    )


FOLDED = {
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm"},
    "gemma3_text": {"input_layernorm", "pre_feedforward_layernorm"},
    "olmo2": set(),
}
REPLACED = {
    "qwen3": {"norm", "q_norm", "k_norm"},
    "qwen3_moe": {"norm", "q_norm", "k_norm"},
    "gemma2": {"norm", "post_attention_layernorm", "post_feedforward_layernorm"},
    "gemma3_text": {
        "norm",
        "q_norm",
        "k_norm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    },
    "olmo2": {
        "norm",
        "q_norm",
        "k_norm",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    },
}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_norms_in_front_of_linears_are_folded_and_all_others_replaced(make_pair, model_type):
    difference = compare_roots(make_pair(model_type))
    folded = {name.split(".")[-2] for name in difference.folded}
    assert folded == FOLDED.get(model_type, {"input_layernorm", "post_attention_layernorm"})
    replaced = {name.split(".")[-2] for name in difference.replaced}
    # Gemma's weights lie around nought, and one beside that is none to divide by.
    assert replaced - folded == REPLACED.get(model_type, {"norm"})


def test_a_norm_that_did_not_change_is_neither_folded_nor_replaced(copies):
    base, expert = copies()
    norm = load_file(base / "model.safetensors")[NORM]
    edit_weights(expert, lambda weights: weights.update({NORM: norm}))
    difference = compare_roots((base, expert))
    assert NORM not in difference.folded | difference.replaced


def test_a_norm_that_is_zero_in_the_base_only_is_replaced_not_folded(copies):
    pair = copies()

    def zero_one_channel(weights):
        weights[NORM][3] = 0

    edit_weights(pair[0], zero_one_channel)
    difference = compare_roots(pair)
    assert NORM in difference.replaced
    torch.testing.assert_close(
        logits(pair[0], served_weights(difference)), logits(pair[1]), rtol=1e-5, atol=1e-5
    )


def test_a_norm_that_is_zero_in_both_is_folded(copies):
    pair = copies()

    def zero_one_channel(weights):
        weights[NORM][3] = 0

    for root in pair:
        edit_weights(root, zero_one_channel)
    difference = compare_roots(pair)
    assert NORM in difference.folded
    torch.testing.assert_close(
        logits(pair[0], served_weights(difference)), logits(pair[1]), rtol=1e-5, atol=1e-5
    )


def test_the_served_moment_is_that_of_the_base_norm(copies):
    pair = copies()
    norm = load_file(pair[0] / "model.safetensors")[NORM]
    ratio = torch.rand(64) + 0.5
    edit_weights(pair[1], lambda weights: weights.update({NORM: norm * ratio}))
    difference = compare_roots(pair)
    spec = next(spec for spec in difference.specs if spec.norm == NORM)
    inputs = torch.randn(100, 64)
    # Of one normalized activation, the base's norm gives 1 / ratio of what the expert's gives.
    served = inputs / ratio
    torch.testing.assert_close(
        difference.served_moment(spec, inputs.T @ inputs),
        served.T @ served,
        # Float32 sums of 100 products in another order, and a ratio that is rounded twice.
        rtol=1e-5,
        atol=1e-4,
    )


def test_the_served_moment_of_a_linear_behind_no_norm_is_the_expert_s(make_pair):
    difference = compare_roots(make_pair())
    spec = next(spec for spec in difference.specs if spec.name.endswith("o_proj.weight"))
    moment = torch.rand(128, 128)
    assert torch.equal(difference.served_moment(spec, moment), moment)


def test_another_shape_is_refused_by_the_tensor_s_name(copies):
    pair = copies()
    edit_weights(pair[1], lambda weights: weights.update({LINEAR: torch.ones(95, 64)}))
    with pytest.raises(ValueError, match=rf"{LINEAR!r} has shape \(96, 64\) .* and \(95, 64\)"):
        compare_roots(pair)


def test_more_rows_of_vocabulary_than_the_base_has_are_refused_with_the_way_out(copies):
    pair = copies(tied=True)
    edit_weights(pair[1], lambda weights: weights.update({EMBEDDING: torch.ones(280, 64)}))
    edit_config(pair[1], vocab_size=280)
    with pytest.raises(ValueError, match=r"280 rows .* 272: .*resize_token_embeddings\(272\)"):
        compare_roots(pair)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_a_resized_expert_lacks_are_the_base_s(copies, tied):
    """As resize_token_embeddings(len(tokenizer)) leaves it, where a base has rows beyond its tokens."""
    pair = copies(tied=tied)
    names = [EMBEDDING] if tied else [EMBEDDING, LM_HEAD]
    before = compare_roots(pair)
    whole = {spec.name: before.delta(spec) for spec in before.specs if spec.name in names}

    def shorten(weights):
        for name in names:
            weights[name] = weights[name][:260].clone()

    edit_weights(pair[1], shorten)
    edit_config(pair[1], vocab_size=260)
    shorter = compare_roots(pair)
    for name in names:
        spec = next(spec for spec in shorter.specs if spec.name == name)
        assert torch.equal(shorter.delta(spec)[:260], whole[name][:260])
        assert not shorter.delta(spec)[260:].any()
        assert shorter.expert.shape(name) == (272, 64)


@pytest.mark.parametrize("side", [0, 1], ids=["base", "expert"])
def test_a_missing_tensor_is_named(copies, side):
    pair = copies()
    edit_weights(pair[side], lambda weights: weights.pop(LINEAR))
    with pytest.raises(ValueError, match=f"{LINEAR!r} is missing"):
        compare_roots(pair)


def test_a_bias_that_only_the_expert_has_is_named(copies):
    pair = copies()
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(pair[1], lambda weights: weights.update({bias: torch.ones(128)}))
    with pytest.raises(ValueError, match=f"{bias!r} is not part of a llama decoder"):
        compare_roots(pair)


def test_a_bias_that_only_the_base_has_is_named(copies):
    pair = copies()
    bias = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(pair[0], lambda weights: weights.update({bias: torch.ones(128)}))
    with pytest.raises(ValueError, match=f"{bias!r} is not part of a llama decoder"):
        compare_roots(pair)


def test_a_tensor_that_the_architecture_does_not_have_is_named(copies):
    pair = copies()
    edit_weights(pair[1], lambda weights: weights.update({"model.adapter.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"'model\.adapter\.weight' is not part of a llama"):
        compare_roots(pair)


def test_rope_frequencies_of_old_checkpoints_are_ignored(copies):
    pair = copies()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(pair[0], lambda weights: weights.update({name: torch.ones(16)}))
    assert name not in {spec.name for spec in compare_roots(pair).specs}


def test_another_rope_base_is_refused(copies):
    pair = copies()
    edit_config(pair[1], rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(ValueError, match=r"'rope_parameters' is .* 10000\.0, .* 500000\.0"):
        compare_roots(pair)


def test_another_rope_scaling_is_refused(copies):
    pair = copies()
    scaling = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}
    edit_config(pair[1], rope_parameters=scaling)
    with pytest.raises(
        ValueError, match=r"'rope_parameters' is .*'default'.* in the base and .*'linear'"
    ):
        compare_roots(pair)


@pytest.mark.parametrize(
    ("nested", "legacy"),
    [
        (
            {"rope_theta": 10000.0, "rope_type": "default"},
            {"rope_theta": 10000, "rope_scaling": None},
        ),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0},
            },
        ),
    ],
    ids=["default", "scaled", "old-type-key", "both-type-keys"],
)
def test_equal_rope_settings_in_two_spellings_are_accepted(copies, nested, legacy):
    pair = copies()
    edit_config(pair[0], "rope_parameters", **legacy)
    edit_config(pair[1], rope_parameters=nested)
    assert compare_roots(pair).specs


@pytest.mark.parametrize(
    ("setting", "value"), [("num_attention_heads", 8), ("rms_norm_eps", 1e-5), ("head_dim", 16)]
)
def test_another_setting_is_refused_by_its_name(copies, setting, value):
    pair = copies()
    edit_config(pair[1], **{setting: value})
    with pytest.raises(ValueError, match=f"setting {setting!r} is"):
        compare_roots(pair)


def test_an_unsupported_architecture_is_refused_by_its_name(copies):
    pair = copies()
    for root in pair:
        edit_config(root, model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type must be one of llama, .* got 'gpt2'"):
        compare_roots(pair)


def test_two_architectures_are_refused(make_pair):
    with pytest.raises(ValueError, match="'model_type' is 'llama' in the base and 'qwen3'"):
        compare_roots((make_pair("llama")[0], make_pair("qwen3")[1]))


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_expert_of_an_untied_base_has_its_embedding_as_head(copies, equal):
    base, _ = copies(tied=False)
    _, expert = make_tied(base)
    if equal:
        edit_weights(base, lambda w: w.update({HEAD: w["model.embed_tokens.weight"].clone()}))
    difference = compare_roots((base, expert))
    spec = next(spec for spec in difference.specs if spec.name == HEAD)
    before, tuned = open_checkpoint(base), open_checkpoint(expert)
    wanted = tuned.load("model.embed_tokens.weight") - before.load(HEAD)
    torch.testing.assert_close(difference.delta(spec), wanted)


def make_tied(base):
    """A fine-tune that was saved tied."""
    expert = shutil.copytree(base, base.parent / "tied")
    edit_weights(expert, lambda weights: weights.pop(HEAD))
    edit_weights(expert, lambda weights: weights[LINEAR].add_(0.1))
    edit_config(expert, tie_word_embeddings=True)
    return base, expert


def test_a_base_without_a_head_that_is_not_tied_is_refused(copies):
    pair = copies()
    for root in pair:
        edit_weights(root, lambda weights: weights.pop(HEAD))
    with pytest.raises(
        ValueError, match=r"has no 'lm_head\.weight', though its configuration does"
    ):
        compare_roots(pair)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("attn_logit_softcapping", 9.0),
        ("final_logit_softcapping", None),
        ("query_pre_attn_scalar", 32),
        ("sliding_window", 16),
        ("hidden_activation", "gelu"),
    ],
)
def test_settings_of_one_architecture_alone_are_compared_too(copies, setting, value):
    pair = copies("gemma2")
    edit_config(pair[1], **{setting: value})
    with pytest.raises(ValueError, match=f"setting {setting!r} is"):
        compare_roots(pair)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_position_embeddings", 4096), ("use_cache", False), ("unsloth_version", "1"),
     ("eos_token_id", [1, 2]), ("attention_dropout", 0.1), ("torch_dtype", "float32")],
)  # fmt: skip
def test_settings_that_change_no_weight_s_meaning_are_not_compared(copies, setting, value):
    pair = copies()
    edit_config(pair[1], **{setting: value})
    assert compare_roots(pair).specs


def test_a_multimodal_checkpoint_is_told_what_to_save(copies):
    pair = copies()
    for root in pair:
        edit_config(root, model_type="gemma3", text_config={"model_type": "gemma3_text"})
    with pytest.raises(ValueError, match="save its language model alone \\('gemma3_text'\\)"):
        compare_roots(pair)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_that_a_wrapper_put_something_in_front_of_are_told(copies, prefix):
    pair = copies()

    def wrap(weights):
        for name in list(weights):
            weights[f"{prefix}{name}"] = weights.pop(name)

    edit_weights(pair[1], wrap)
    with pytest.raises(ValueError, match=f"its names begin with {prefix!r}: save the model inside"):
        compare_roots(pair)


def test_a_setting_of_another_kind_is_refused_in_one_line(copies):
    pair = copies()
    edit_config(pair[1], num_hidden_layers="two")
    with pytest.raises(ValueError, match="configuration of the llama cannot be used") as caught:
        compare_roots(pair)
    assert "\n" not in str(caught.value)


def test_a_tied_base_and_an_untied_expert_are_refused(make_pair):
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is tied to .* save the base untied"):
        compare_roots((make_pair(tied=True)[0], make_pair(tied=False)[1]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(copies, value):
    pair = copies()

    def spoil(weights):
        weights[LINEAR][5, 7] = value

    edit_weights(pair[1], spoil)
    difference = compare_roots(pair)
    spec = next(spec for spec in difference.specs if spec.name == LINEAR)
    with pytest.raises(ValueError, match=f"{LINEAR!r} holds NaN or infinity"):
        difference.delta(spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_refused_before_any_long_work(copies, value):
    pair = copies()

    def spoil(weights):
        weights[NORM][5] = value

    edit_weights(pair[1], spoil)
    with pytest.raises(ValueError, match=f"{NORM!r} holds NaN or infinity"):
        compare_roots(pair)


def test_an_attention_window_on_one_side_only_is_refused(copies):
    base, expert = copies("mistral")
    edit_config(base, sliding_window=None)
    edit_config(expert, sliding_window=4096)
    with pytest.raises(ValueError, match="'sliding_window' is None in the base and 4096"):
        compare_roots((base, expert))


def test_a_norm_weight_that_the_expert_zeroes_is_replaced(copies):
    base, expert = copies()
    edit_weights(expert, lambda weights: weights[NORM].index_fill_(0, torch.tensor([3]), 0))
    assert NORM in compare_roots((base, expert)).replaced
