import math
import re

import pytest
import torch
from torch.nn import functional

from deltamux.compression import evaluate as evaluate_module
from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.merge import merge, reconstructed
from deltamux.compression.checkpoint.architecture import MODEL_TYPES
from deltamux.compression.checkpoint.checkpoint import open_checkpoint
from deltamux.compression.evaluate import Reference, evaluate, report, summary
from deltamux.compression.streaming.forward import StreamedModel, batches
from deltamux.compression.streaming.text import Sample


def make_samples(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(272, (length,), generator=generator), length // 3)
        for length in lengths
    ]


SAMPLES = make_samples(31, 12, 50)


def load_model(root):
    from transformers import AutoModelForCausalLM

    # Other kernels know no soft caps.
    return AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    )


def streamed(root):
    checkpoint = open_checkpoint(root)
    return StreamedModel(checkpoint.config, checkpoint.load, torch.float32, checkpoint.tied)


@torch.no_grad()
def logits_of_responses(root, samples):
    """transformers' logits at the positions that predict a response token, sample by sample."""
    model = load_model(root)
    return torch.cat(
        [model(s.ids[None]).logits[0, s.response_start - 1 : -1] for s in samples]
    ).double()


def targets_of(samples):
    return torch.cat([sample.ids[sample.response_start :] for sample in samples])


@torch.no_grad()
def loss_of(root, samples):
    """transformers' own loss, weighted by response tokens."""
    model = load_model(root)
    total = 0.0
    for sample in samples:
        labels = sample.ids.clone()
        labels[: sample.response_start] = -100
        loss = model(sample.ids[None], labels=labels[None]).loss
        total += float(loss) * (len(labels) - sample.response_start)
    return total / len(targets_of(samples))


@pytest.fixture(scope="module")
def measured(make_pair, make_artifact, tmp_path_factory):
    """(base, expert, merged checkpoint, evaluation) of a pair."""
    base, expert = make_pair("qwen3", True)
    artifact = Artifact(make_artifact("qwen3", True))
    merged = tmp_path_factory.mktemp("merged") / "checkpoint"
    merge(open_checkpoint(base), artifact, merged, progress=False)
    pair = open_checkpoint(base), open_checkpoint(expert)
    return base, expert, merged, evaluate(*pair, artifact, SAMPLES, progress=False)


def test_losses_are_those_of_transformers(measured):
    *roots, evaluation = measured
    found = [evaluation.nll_base, evaluation.nll_expert, evaluation.nll_compressed]
    # Both run in float32; sums are taken in another order.
    assert found == pytest.approx([loss_of(root, SAMPLES) for root in roots], rel=1e-4)


def test_divergences_are_those_of_transformers_distributions(measured):
    *roots, evaluation = measured
    base, expert, compressed = (
        functional.log_softmax(logits_of_responses(root, SAMPLES), dim=-1) for root in roots
    )
    for other, found in ((compressed, evaluation.kl), (base, evaluation.kl_base)):
        wanted = (expert.exp() * (expert - other)).sum(dim=-1).mean()
        # Both run in float32; sums are taken in another order.
        assert found == pytest.approx(float(wanted), rel=1e-4)


def test_the_divergence_alone_is_that_of_the_whole_comparison(measured, make_pair, make_artifact):
    base, expert = (open_checkpoint(root) for root in make_pair("qwen3", True))
    artifact = Artifact(make_artifact("qwen3", True))
    reference = Reference(base, expert, SAMPLES, progress=False)
    found = reference.divergence(reconstructed(artifact, base))
    assert found == pytest.approx(measured[-1].kl, rel=1e-6)


def test_agreement_is_the_share_of_equal_likeliest_tokens(measured):
    _, expert, merged, evaluation = measured
    likeliest = [logits_of_responses(root, SAMPLES).argmax(dim=-1) for root in (expert, merged)]
    wanted = (likeliest[0] == likeliest[1]).float().mean()
    assert evaluation.top1_agreement == pytest.approx(float(wanted))
    assert 0 < evaluation.top1_agreement < 1


def test_an_exact_match_is_a_response_whose_every_token_is_the_likeliest(make_pair, make_artifact):
    root = make_pair("qwen3", True)[1]
    matched, missed = make_samples(30, 30)
    model = load_model(root)
    for index in range(matched.response_start, 30):
        with torch.no_grad():
            matched.ids[index] = model(matched.ids[None, :index]).logits[0, -1].argmax()
    pair = (open_checkpoint(path) for path in make_pair("qwen3", True))
    artifact = Artifact(make_artifact("qwen3", True))
    found = evaluate(*pair, artifact, [matched, missed, matched], progress=False)
    assert found.exact_match_expert == pytest.approx(2 / 3)


def test_gain_kept_is_the_share_of_the_expert_s_gain(measured):
    evaluation = measured[-1]
    gain = evaluation.nll_base - evaluation.nll_expert
    wanted = (evaluation.nll_base - evaluation.nll_compressed) / gain
    assert evaluation.gain_kept == pytest.approx(wanted)


def test_every_response_token_counts_once(measured):
    assert measured[-1].tokens == len(targets_of(SAMPLES))


def test_positions_are_compared_in_chunks_without_a_difference(
    make_pair, make_artifact, monkeypatch, measured
):
    monkeypatch.setattr(evaluate_module, "HEAD_CHUNK", 7)
    monkeypatch.setattr(evaluate_module, "BATCH_TOKENS", 40)
    pair = (open_checkpoint(root) for root in make_pair("qwen3", True))
    artifact = Artifact(make_artifact("qwen3", True))
    found = evaluate(*pair, artifact, SAMPLES, progress=False)
    # The same float32 sums in another order.
    assert list(vars(found).values()) == pytest.approx(list(vars(measured[-1]).values()), rel=1e-4)


def test_an_expert_that_gained_nothing_has_kept_everything(make_pair, compress_pair, tmp_path):
    base = make_pair()[0]
    artifact = Artifact(compress_pair(base, base, tmp_path / "artifact"))
    pair = open_checkpoint(base), open_checkpoint(base)
    found = evaluate(*pair, artifact, SAMPLES, progress=False)
    assert found.gain_kept == 1
    assert found.kl == found.kl_base == 0
    assert found.top1_agreement == 1


def test_the_report_adds_the_sizes(make_artifact, measured):
    artifact = Artifact(make_artifact("qwen3", True))
    result = report(measured[-1], artifact)
    assert result["bytes"] == artifact.total_bytes()
    assert result["bytes_full"] == artifact.manifest.totals.expert_bytes
    assert result["bits_per_weight"] == artifact.manifest.totals.bits_per_weight


def test_the_summary_is_one_line_with_sizes_and_losses(make_pair, compress_pair, tmp_path):
    root = compress_pair(*make_pair(), tmp_path / "artifact", verify=True)
    line = summary(Artifact(root).manifest)
    assert "\n" not in line
    assert re.search(r"bits per linear weight, in a slot .* over all weights\), gain kept", line)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_states_and_logits_of_a_padded_batch_are_those_of_each_sample_alone(make_pair, model_type):
    root = make_pair(model_type)[1]
    model = load_model(root)
    spans = [slice(sample.response_start - 1, -1) for sample in SAMPLES]
    with torch.no_grad():
        states = [model.model(s.ids[None]).last_hidden_state[0] for s in SAMPLES]
        logits = [model(s.ids[None]).logits[0] for s in SAMPLES]
    found = streamed(root)
    final = found.hidden_states([SAMPLES])
    for ours, theirs in ((final, states), (found.logits(final, found.head()), logits)):
        wanted = torch.cat([each[span] for each, span in zip(theirs, spans, strict=True)])
        # The same float32 products, in blocks of another size.
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-5)


def test_hidden_states_follow_the_plan_batch_by_batch(make_pair):
    root = make_pair()[1]
    plan = [SAMPLES[1:], SAMPLES[:1]]
    alone = [streamed(root).hidden_states([[sample]]) for batch in plan for sample in batch]
    # The same float32 products, in blocks of another size.
    torch.testing.assert_close(
        streamed(root).hidden_states(plan), torch.cat(alone), rtol=1e-4, atol=1e-5
    )


def test_every_layer_is_announced_once_for_all_batches(make_pair):
    calls = []
    streamed(make_pair()[1]).hidden_states(
        [[sample] for sample in SAMPLES], lambda: calls.append(1)
    )
    assert len(calls) == 2


def test_a_sliding_window_is_that_of_transformers(checkpoints, tmp_path):
    root = checkpoints.save_base(tmp_path / "base", "mistral", sliding_window=8)
    samples = make_samples(40, 25)
    model = streamed(root)
    found = (model.hidden_states([samples]) @ model.head().T).double()
    # The same float32 products, in blocks of another size.
    torch.testing.assert_close(found, logits_of_responses(root, samples), rtol=1e-4, atol=1e-4)


def test_a_sliding_window_changes_what_long_text_gives(checkpoints, tmp_path):
    narrow = checkpoints.save_base(tmp_path / "narrow", "mistral", sliding_window=8)
    wide = checkpoints.save_base(tmp_path / "wide", "mistral")
    found = [streamed(root).hidden_states([make_samples(40)]) for root in (narrow, wide)]
    assert not torch.allclose(*found, atol=0.1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_is_the_embedding_where_they_are_tied(make_pair, tied):
    root = make_pair("llama", tied)[0]
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(streamed(root).head(), open_checkpoint(root).load(name))


def test_weights_leave_memory_after_the_pass(make_pair):
    model = streamed(make_pair()[0])
    model.hidden_states([SAMPLES])
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_a_weight_of_another_shape_is_named(make_pair):
    config = open_checkpoint(make_pair()[0]).config
    model = StreamedModel(config, lambda name: torch.zeros(3, 3), torch.float32, False)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' has shape \(3, 3\)"):
        model.hidden_states([SAMPLES])


def test_batches_hold_every_sample_once_within_the_limit():
    samples = make_samples(9, 3, 30, 3, 8, 100, 7)
    found = list(batches(samples, 32))
    assert sorted(len(s.ids) for batch in found for s in batch) == [3, 3, 7, 8, 9, 30, 100]
    for batch in found:
        padded = len(batch) * max(len(sample.ids) for sample in batch)
        assert padded <= 32 or len(batch) == 1


def test_losses_are_finite(measured):
    assert all(math.isfinite(value) for value in vars(measured[-1]).values())
