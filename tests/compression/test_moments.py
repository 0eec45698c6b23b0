import pytest
import torch

from deltamux.compression.checkpoint.architecture import MODEL_TYPES, tensor_specs
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.streaming import moments as moments_module
from deltamux.compression.streaming.forward import StreamedModel
from deltamux.compression.streaming.moments import second_moments
from deltamux.compression.streaming.text import Sample

# Unequal lengths, so that a batch has padding; 93 tokens are more than the 64 channels.
LENGTHS = (31, 12, 50)
# Of a mixture's experts: where they are in checkpoints, the matrices that read the input, and the one behind them.
MIXTURES = {
    "qwen3_moe": (".mlp.", "gate_proj", "up_proj", "down_proj"),
    "mixtral": (".block_sparse_moe.", "w1", "w3", "w2"),
}


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(272, (length,), generator=generator), length // 3)
        for length in LENGTHS
    ]


def hooked_moments(root, samples):
    """E[x xᵀ] in float64 of what plain hooks see in transformers, one sample at a time."""
    from transformers import AutoModelForCausalLM

    seen = {}

    def collect(name):
        def hook(_module, args):
            seen.setdefault(name, []).append(args[0][0].double())

        return hook

    def collect_experts(name):
        def hook(module, args):
            for token, chosen in zip(args[0].double(), args[1].tolist(), strict=True):
                for expert in chosen:
                    inner = module.gate_up_proj[expert].double() @ token
                    gate, up = inner.chunk(2)
                    each = (
                        f"{name.replace('.mlp.', MIXTURES[model.config.model_type][0])}.{expert}."
                    )
                    for part in MIXTURES[model.config.model_type][1:3]:
                        seen.setdefault(f"{each}{part}.weight", []).append(token[None])
                    behind = f"{each}{MIXTURES[model.config.model_type][3]}.weight"
                    seen.setdefault(behind, []).append((module.act_fn(gate) * up)[None])

        return hook

    model = AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    )
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(collect(f"{name}.weight"))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(collect_experts(name))
    with torch.no_grad():
        for sample in samples:
            model(sample.ids[None])
    inputs = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: x.T @ x / sum(LENGTHS) for name, x in inputs.items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_moments_are_those_of_every_token_and_of_no_padding(make_pair, samples, model_type):
    root = make_pair(model_type)[1]
    wanted = hooked_moments(root, samples)
    found = {}
    for _, moments in second_moments(open_checkpoint(root), samples):
        found |= moments
    assert found.keys() == wanted.keys()
    for name, moment in wanted.items():
        scale = float(moment.diagonal().mean())
        # Float32 sums over 93 tokens of activations that padding computes in other blocks.
        torch.testing.assert_close(found[name], moment.float(), rtol=1e-4, atol=1e-5 * scale)


def test_several_batches_give_the_moments_of_one(make_pair, samples, monkeypatch):
    expert = open_checkpoint(make_pair()[1])
    whole = dict(second_moments(expert, samples))
    monkeypatch.setattr(moments_module, "BATCH_TOKENS", 12)
    parts = dict(second_moments(expert, samples))
    for layer, moments in whole.items():
        for name, moment in moments.items():
            # The same float32 sums in another order.
            torch.testing.assert_close(parts[layer][name], moment, rtol=1e-4, atol=1e-5)


def test_linears_that_read_the_same_activations_share_one_matrix(make_pair, samples):
    expert = open_checkpoint(make_pair()[1])
    _, moments = next(second_moments(expert, samples))
    readers = {spec.name: spec.reader for spec in tensor_specs(expert.config, set(expert.files))}
    assert all(moments[linear] is moments[readers[linear]] for linear in moments)
    assert len({id(moment) for moment in moments.values()}) == 4


def test_a_skipped_layer_is_passed_and_not_collected(make_pair, samples):
    expert = open_checkpoint(make_pair()[1])
    whole = dict(second_moments(expert, samples))
    skipped = dict(second_moments(expert, samples, skip=lambda layer: layer == 0))
    assert skipped[0] == {}
    assert skipped[1].keys() == whole[1].keys()
    for name, moment in whole[1].items():
        # The layer behind the skipped one sees the same activations, to the bit.
        assert torch.equal(skipped[1][name], moment)


def test_the_next_layer_runs_when_the_next_item_is_asked_for(make_pair, samples, monkeypatch):
    ran = []
    advance = StreamedModel.advance

    def record(self, states, layer):
        ran.append(layer)
        advance(self, states, layer)

    monkeypatch.setattr(StreamedModel, "advance", record)
    layers = second_moments(open_checkpoint(make_pair()[1]), samples)
    assert next(layers)[0] == 0
    assert ran == [0]


def test_no_text_is_refused(make_pair):
    with pytest.raises(ValueError, match="second moments need at least one conversation"):
        next(second_moments(open_checkpoint(make_pair()[1]), []))
