"""How much the expert's predictions feel an error in each output row of each linear.

The Kullback-Leibler divergence between the expert and a slightly changed model is, to second order,
½ δᵀ F δ with F the Fisher information, the second moment of the gradient of log p(token) where tokens
are drawn from the expert itself (Martens 2014, arXiv 1412.1193). With errors of different rows and
positions taken as independent, a change E of a linear's weight costs

    KL ≈ ½ Σ_i g_i · (E H Eᵀ)_ii ,     g_i = Σ_t (∂ log p / ∂ y_ti)² / P ,

nats per predicting position: t runs over all tokens, P is the number of predicting ones, H = E[x xᵀ].
One forward and one backward pass; both go layer by layer, so that memory holds one layer and the
activations between layers.
"""

import torch
from torch.nn import functional

from deltamux.compression.checkpoint.checkpoint import Checkpoint
from deltamux.compression.streaming.backward import Activated, final_gradients, layer_gradients
from deltamux.compression.streaming.forward import StreamedModel, batches
from deltamux.compression.streaming.text import Sample

BATCH_TOKENS = 2_048
SEED = 0


def output_sensitivity(expert: Checkpoint, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Sensitivity g of every linear's output rows.

    Args:
        expert: The fine-tuned model.
        samples: Conversations; a few thousand tokens suffice.

    Returns:
        Linear weight name to float32 [N] on the CPU, nats per squared output unit.
    """
    streamed = StreamedModel(expert.config, expert.load, torch.float32, expert.tied)
    run = Activated.through(streamed, list(batches(samples, BATCH_TOKENS)))
    generator = torch.Generator(streamed.device).manual_seed(SEED)
    head_VH = streamed.head()

    def drawn(final_PH: torch.Tensor, _places: slice) -> torch.Tensor:
        logs_PV = functional.log_softmax(streamed.logits(final_PH, head_VH), dim=-1)
        tokens = torch.multinomial(logs_PV.detach().exp(), 1, generator=generator)
        return logs_PV.gather(1, tokens).sum()

    gradients = final_gradients(run, drawn)
    positions = sum(len(state.targets_P) for state in run.states)
    found: dict[str, torch.Tensor] = {}

    def add_squares(name: str, _input: torch.Tensor, gradient_BTN: torch.Tensor) -> None:
        square_N = gradient_BTN.flatten(0, 1).square().sum(dim=0).cpu() / positions
        found[name] = found[name] + square_N if name in found else square_N

    for layer in reversed(range(streamed.num_layers)):
        gradients = layer_gradients(run, layer, gradients, add_squares)
    return found
