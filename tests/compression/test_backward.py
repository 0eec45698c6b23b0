import pytest
import torch
from torch.nn import functional

from deltamux.compression.checkpoint.architecture import MODEL_TYPES
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.streaming.backward import Activated, final_gradients, layer_gradients
from deltamux.compression.streaming.fisher import BATCH_TOKENS, SEED, output_sensitivity
from deltamux.compression.streaming.forward import StreamedModel, batches
from deltamux.compression.streaming.moments import second_moments
from deltamux.compression.streaming.text import Sample, random_samples

HIDDEN = {"qwen2": 128}
# What embeddings are multiplied with behind the table: √64, and a setting of its own.
SCALED = {"gemma2": 8.0, "gemma3_text": 8.0, "granite": 3.0}
# Gradients reach the linears, and a mixture's experts are none.
DENSE = [each for each in MODEL_TYPES if each not in ("qwen3_moe", "mixtral")]


def make_samples(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(272, (length,), generator=generator), length // 3)
        for length in lengths
    ]


# In order of length, as batches are made, and with padding in the first batch.
PLAN = [make_samples(9, 12, 14), make_samples(21)]
SAMPLES = [sample for batch in PLAN for sample in batch]


def load_model(root):
    from transformers import AutoModelForCausalLM

    # Other kernels know no soft caps.
    return AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    )


def streamed(root):
    checkpoint = open_checkpoint(root)
    return StreamedModel(checkpoint.config, checkpoint.load, torch.float32, checkpoint.tied)


def directions(model_type):
    """What the final hidden states of every batch's positions are multiplied with."""
    generator = torch.Generator().manual_seed(1)
    counts = [sum(len(s.ids) - s.response_start for s in batch) for batch in PLAN]
    width = HIDDEN.get(model_type, 64)
    return [torch.randn(count, width, generator=generator) for count in counts]


def plain_autograd(root, wanted):
    """transformers' model after the backward pass of Σ ⟨final hidden state, direction⟩."""
    model = load_model(root)
    rows = iter(torch.cat(wanted))
    for sample in SAMPLES:
        hidden = model.model(sample.ids[None]).last_hidden_state[0, sample.response_start - 1 : -1]
        sum((state * next(rows)).sum() for state in hidden).backward()
    return dict(model.named_parameters())


@pytest.fixture(scope="module", params=DENSE)
def passes(request, make_pair):
    """Weight gradients by name and embedding gradients: streamed and plain."""
    root = make_pair(request.param)[1]
    wanted = directions(request.param)
    run = Activated.through(streamed(root), PLAN)
    wanted_PH = torch.cat(wanted)
    gradients = final_gradients(run, lambda final, places: (final * wanted_PH[places]).sum())
    found = {}

    def visit(name, x_BTK, gradient_BTN):
        gradient = gradient_BTN.flatten(0, 1).T @ x_BTK.flatten(0, 1)
        found[name] = found.get(name, 0) + gradient

    for layer in reversed(range(run.model.num_layers)):
        gradients = layer_gradients(run, layer, gradients, visit)
    return found, run, gradients, plain_autograd(root, wanted)


def test_every_linear_sees_the_gradients_of_plain_autograd(passes):
    found, _, _, parameters = passes
    wanted = {name for name in parameters if name.endswith("_proj.weight")}
    assert found.keys() == wanted
    for name, gradient in found.items():
        scale = float(parameters[name].grad.abs().max())
        # Float32 through two layers, padded batches against single samples.
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-3, atol=1e-4 * scale)


def test_what_is_left_below_the_first_layer_is_the_embedding_s_gradient(passes):
    _, run, gradients, parameters = passes
    table = parameters["model.embed_tokens.weight"]
    found = torch.zeros_like(table)
    for batch, gradient_BTH in zip(PLAN, gradients, strict=True):
        for sample, gradient_TH in zip(batch, gradient_BTH, strict=True):
            found.index_add_(0, sample.ids, gradient_TH[: len(sample.ids)])
    found *= SCALED.get(run.model.model.config.model_type, 1.0)
    scale = float(table.grad.abs().max())
    # Float32 through two layers, padded batches against single samples.
    torch.testing.assert_close(found, table.grad, rtol=1e-3, atol=1e-4 * scale)
    assert run.model.num_layers == 2


def test_padding_has_no_gradient(passes):
    _, run, gradients, _ = passes
    for state, gradient_BTH in zip(run.states, gradients, strict=True):
        assert not gradient_BTH[~state.inside_BT].any()
        assert gradient_BTH[state.inside_BT].any()


def test_weights_leave_memory_after_the_backward_pass(passes):
    assert all(parameter.is_meta for parameter in passes[1].model.model.parameters())


def test_what_enters_every_layer_is_kept(make_pair):
    model = streamed(make_pair()[1])
    run = Activated.through(model, PLAN)
    states = model.start(PLAN)
    for layer, entering in enumerate(run.entering):
        for kept, state in zip(entering, states, strict=True):
            assert torch.equal(kept, state.hidden_BTH)
        model.advance(states, layer)


@torch.no_grad()
def drawn_tokens(model, samples):
    """Tokens as `output_sensitivity` draws them, batch by batch, from transformers' predictions."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = []
    for batch in batches(samples, BATCH_TOKENS):
        logits = [model(s.ids[None]).logits[0, s.response_start - 1 : -1] for s in batch]
        probabilities = torch.cat(logits).softmax(dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        drawn += zip(batch, tokens.split([len(rows) for rows in logits]), strict=True)
    return drawn


@pytest.mark.parametrize("model_type", DENSE)
def test_sensitivity_is_the_mean_square_of_the_gradients_of_drawn_tokens(make_pair, model_type):
    root = make_pair(model_type)[1]
    samples = make_samples(9, 30, 14, 21)
    model = load_model(root)
    outputs = {}

    def keep(name):
        def hook(_module, _args, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(keep(f"{name}.weight"))
    wanted, positions = {}, 0
    for sample, tokens in drawn_tokens(load_model(root), samples):
        logits = model(sample.ids[None]).logits[0, sample.response_start - 1 : -1]
        functional.nll_loss(logits.log_softmax(dim=-1), tokens, reduction="sum").backward()
        positions += len(tokens)
        for name, output in outputs.items():
            wanted[name] = wanted.get(name, 0) + output.grad[0].square().sum(dim=0)
    found = output_sensitivity(open_checkpoint(root), samples)
    assert found.keys() == wanted.keys()
    for name, squares in wanted.items():
        scale = float(squares.max()) / positions
        # Squares of float32 gradients through two layers.
        torch.testing.assert_close(found[name], squares / positions, rtol=1e-2, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "linear", ["0.self_attn.v_proj", "0.mlp.down_proj", "1.self_attn.o_proj", "1.mlp.up_proj"]
)
def test_sensitivity_predicts_the_divergence_of_a_small_change(make_pair, linear):
    root = make_pair()[1]
    expert = open_checkpoint(root)
    samples = random_samples(272, count=12, length=40)
    name = f"model.layers.{linear}.weight"
    weight = expert.load(name)
    generator = torch.Generator().manual_seed(2)
    error = torch.randn(weight.shape, generator=generator) * 0.02 * weight.std()
    moment = dict(second_moments(expert, samples))[int(linear[0])][name]
    felt = output_sensitivity(expert, samples)[name]
    predicted = 0.5 * float(felt @ ((error @ moment) * error).sum(dim=1))
    model = load_model(root)
    logs = []
    for changed in (False, True):
        if changed:
            model.get_parameter(name).data += error
        with torch.no_grad():
            logits = [model(s.ids[None]).logits[0, s.response_start - 1 : -1] for s in samples]
        logs.append(torch.cat(logits).double().log_softmax(dim=-1))
    positions = len(logs[0])
    measured = float((logs[0].exp() * (logs[0] - logs[1])).sum()) / positions
    # One drawn token a position, and errors of rows and positions are not quite independent.
    assert 0.6 < predicted / measured < 1.6
