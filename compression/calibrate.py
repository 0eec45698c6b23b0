"""Second moments of every linear's input, collected on the expert.

Quantization error in input channel j reaches the output in proportion to E[x_j²] (the diagonal of
the layer-wise Hessian of Optimal Brain Compression, Frantar & Alistarh 2022). The model runs and
the sums are taken in float32: in bfloat16 sums stop growing after a few hundred terms, and CPUs
without matrix units are no faster in it.
"""

import torch
from torch import nn
from tqdm import tqdm

from deltamux.compression.checkpoint import Checkpoint
from deltamux.compression.forward import StreamedModel, batches
from deltamux.compression.text import Sample

BATCH_TOKENS = 16_384


def input_energy(
    expert: Checkpoint, samples: list[Sample], progress: bool = True
) -> dict[str, torch.Tensor]:
    """E[x_j²] of each linear's input over the tokens of the samples.

    Args:
        expert: The fine-tuned model the activations come from.
        samples: Calibration conversations.
        progress: Show a bar.

    Returns:
        Linear weight name to float32 [K].
    """
    streamed = StreamedModel(expert.root, expert.load, torch.float32, expert.tied)
    sums: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def collect(name: str) -> None:
        def hook(_module: nn.Module, args: tuple[torch.Tensor]) -> None:
            energy = args[0].float().square()
            total = torch.einsum("btk,bt->k", energy, mask)
            sums[name] = sums[name] + total if name in sums else total

        modules[name].register_forward_pre_hook(hook)

    modules = dict(streamed.linears())
    for name in modules:
        collect(name)
    plan = list(batches(samples, BATCH_TOKENS))
    steps = len(plan) * len(streamed.model.layers)
    with tqdm(total=steps, desc="calibrate", unit="layer", disable=not progress) as bar:
        for layer in streamed.model.layers:
            layer.register_forward_hook(lambda *_: bar.update() and None)
        for batch in plan:
            lengths = torch.tensor([len(sample.ids) for sample in batch])
            mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).float()
            streamed.hidden_states(batch)
    tokens = sum(len(sample.ids) for sample in samples)
    return {name: total / tokens for name, total in sums.items()}
