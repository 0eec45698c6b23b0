"""How much of the fine-tuning survives compression, on held-out text.

Over the response tokens of the samples, with p the expert's next-token distribution:

    nll       mean −log-likelihood of the reference, nats per token
    gain_kept (nll_base − nll_compressed) / (nll_base − nll_expert); 1 where nothing was gained
    kl        mean KL(p ‖ compressed), nats per token; kl_base the same for the base
    top1_agreement  share of positions where expert and compressed agree on the likeliest token
    exact_match     share of samples whose whole response greedy decoding would reproduce: where each
                    token is the likeliest one after those before it

All three models run in float32, so that rounding of activations does not blur small differences.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from deltamux.compression.artifact.artifact import Artifact
from deltamux.compression.artifact.manifest import Manifest
from deltamux.compression.artifact.merge import reconstructed
from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.streaming.forward import StreamedModel, WeightSource, batches
from deltamux.compression.streaming.text import Sample

BATCH_TOKENS = 8_192
HEAD_CHUNK = 256


@dataclass(frozen=True)
class Evaluation:
    """Losses and distances; nats per response token."""

    nll_base: float
    nll_expert: float
    nll_compressed: float
    gain_kept: float
    kl: float
    kl_base: float
    top1_agreement: float
    exact_match: float
    exact_match_expert: float
    tokens: int


class Reference:
    """Base and expert on fixed text, each run at most once, to compare other models with.

    Args:
        base: The shared model.
        expert: The uncompressed fine-tune.
        samples: Held-out conversations.
        progress: Show a bar.
    """

    def __init__(
        self, base: Checkpoint, expert: Checkpoint, samples: list[Sample], progress: bool = True
    ) -> None:
        self._models, self._progress = (base, expert), progress
        self._plan = list(batches(samples, BATCH_TOKENS))
        responses = [sample.predicted for batch in self._plan for sample in batch]
        self._targets = torch.cat(responses)
        self._sample = torch.repeat_interleave(
            torch.arange(len(responses)), torch.tensor([len(ids) for ids in responses])
        )

    def compare(self, source: WeightSource) -> Evaluation:
        """Measure a model that is given by its weights."""
        states = [self._base, self._expert, self._run(self._models[0], source)]
        return _compare(states, self._targets, self._sample)

    def divergence(self, source: WeightSource) -> float:
        """The KL of such a model alone, for which the base need not run."""
        return _divergence(self._expert, self._run(self._models[0], source))

    @cached_property
    def _base(self) -> "_Predictions":
        base = self._models[0]
        return self._run(base, base.load)

    @cached_property
    def _expert(self) -> "_Predictions":
        expert = self._models[1]
        return self._run(expert, expert.load)

    def _run(self, like: Checkpoint, source: WeightSource) -> "_Predictions":
        """Final hidden states and head, in the layout of a checkpoint."""
        model = StreamedModel(like.config, source, torch.float32, like.tied)
        with tqdm(
            total=model.num_layers, desc="evaluate", unit="layer", disable=not self._progress
        ) as bar:
            return _Predictions(model, model.hidden_states(self._plan, bar.update), model.head())


@dataclass(frozen=True)
class _Predictions:
    model: StreamedModel
    hidden_PH: torch.Tensor
    head_VH: torch.Tensor

    def log_probabilities(self, span: slice) -> torch.Tensor:
        logits_PV = self.model.logits(self.hidden_PH[span], self.head_VH)
        return functional.log_softmax(logits_PV, dim=-1)


def evaluate(
    base: Checkpoint,
    expert: Checkpoint,
    artifact: Artifact,
    samples: list[Sample],
    progress: bool = True,
) -> Evaluation:
    """Compare base, expert and decompressed expert on the samples' response tokens."""
    base = base.as_served(artifact.manifest.base.quantization)
    reference = Reference(base, expert, samples, progress)
    return reference.compare(reconstructed(artifact, base))


@torch.no_grad()
def _divergence(expert: _Predictions, other: _Predictions) -> float:
    """Mean KL(expert ‖ other), nats per position."""
    total, positions = 0.0, len(expert.hidden_PH)
    for start in range(0, positions, HEAD_CHUNK):
        span = slice(start, start + HEAD_CHUNK)
        total += _summed_divergence(expert.log_probabilities(span), other.log_probabilities(span))
    return total / positions


def _summed_divergence(expert_PV: torch.Tensor, other_PV: torch.Tensor) -> float:
    return float(functional.kl_div(other_PV, expert_PV, log_target=True, reduction="sum"))


@torch.no_grad()
def _compare(models: list[_Predictions], targets: torch.Tensor, sample: torch.Tensor) -> Evaluation:
    """Sums over positions, in chunks: the logits of all of them would not fit in memory."""
    nll = torch.zeros(3, dtype=torch.float64)
    kl = torch.zeros(3, dtype=torch.float64)
    agreed = 0
    missed = torch.zeros(3, int(sample[-1]) + 1, dtype=torch.bool)
    for start in range(0, len(targets), HEAD_CHUNK):
        span = slice(start, start + HEAD_CHUNK)
        logs = [model.log_probabilities(span) for model in models]
        expert, wanted = logs[1], targets[span].to(logs[1].device)
        likeliest = [log.argmax(dim=-1) for log in logs]
        for index, log in enumerate(logs):
            nll[index] += functional.nll_loss(log, wanted, reduction="sum").double().cpu()
            kl[index] += _summed_divergence(expert, log)
            missed[index, sample[span][(likeliest[index] != wanted).cpu()]] = True
        agreed += int((likeliest[2] == likeliest[1]).sum())
    nll, kl = nll / len(targets), kl / len(targets)
    matched = 1 - missed.double().mean(dim=1)
    gain = float(nll[0] - nll[1])
    return Evaluation(
        nll_base=float(nll[0]),
        nll_expert=float(nll[1]),
        nll_compressed=float(nll[2]),
        gain_kept=float(nll[0] - nll[2]) / gain if gain else 1.0,
        kl=float(kl[2]),
        kl_base=float(kl[0]),
        top1_agreement=agreed / len(targets),
        exact_match=float(matched[2]),
        exact_match_expert=float(matched[1]),
        tokens=len(targets),
    )


def report(evaluation: Evaluation, artifact: Artifact) -> dict[str, Any]:
    """The evaluation with the artifact's size, as `deltamux evaluate --json` prints it."""
    measured = asdict(evaluation)
    del measured["tokens"]
    totals = artifact.manifest.totals
    sizes: dict[str, float] = {
        "bits_per_weight": totals.bits_per_weight,
        "bytes": artifact.total_bytes(),
        "bytes_full": totals.expert_bytes,
    }
    if totals.slot_bits_per_weight is not None and totals.slot_bits_overall is not None:
        sizes["slot_bits_per_weight"] = totals.slot_bits_per_weight
        sizes["slot_bits_overall"] = totals.slot_bits_overall
    return measured | sizes


def summary(manifest: Manifest) -> str:
    """One line on what was saved and what was lost."""
    totals, checked = manifest.totals, manifest.verification
    line = (
        f"{totals.expert_bytes / 1e6:.1f} MB -> {totals.weights_file_bytes / 1e6:.1f} MB, "
        f"{totals.bits_per_weight:.3f} bits per linear weight"
    )
    if totals.slot_bytes is not None:
        line += (
            f", in a slot {totals.slot_bytes / 1e6:.1f} MB, {totals.slot_bits_per_weight:.3f} bits "
            f"({totals.slot_bits_overall:.3f} over all weights)"
        )
    if checked:
        line += f", gain kept {checked['gain_kept']:.1%}, KL {checked['kl']:.4f} nats/token"
    return line
