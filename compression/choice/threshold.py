"""Rates learned by gradient descent that meet the budget exactly at every step.

FCPTS (Gong et al., AAAI 2024, "Fast and Controllable Post-training Sparsity", arXiv 2405.05808)
learns one threshold per layer: a differentiable bridge turns thresholds into sparsities, so that the
loss and the global sparsity both have gradients. Here the bridge is measured rather than estimated.
With t_c the threshold of matrix c, its place on a ladder of R_c rungs is

    p_c = (R_c − 1) · sigmoid(t_c + ν) ,

and its bytes b_c(p) and log error are linear between rungs. FCPTS adds the deviation from the global
rate to the loss; here the shift ν(t) solves Σ_c b_c = B, so the constraint holds at every step, and the
gradient goes through it by implicit differentiation,

    dL/dt_c = g_c − a_c · Σ_k g_k / Σ_k a_k ,     g = ∂L/∂(t + ν) ,     a = ∂b/∂(t + ν) .

Shapes: C curves, R rungs of the longest ladder, G shifts tried at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deltamux.compression.choice.knapsack import fill
from deltamux.compression.choice.problem import Choice, Curve

# Of Adam; chosen, not measured.
LEARNING_RATE = 0.1
NUM_STEPS = 200
# Beyond this shift of a sigmoid's argument every ladder is at one of its ends.
LARGEST_SHIFT = 80.0
SHIFTS_AT_ONCE = 65
# 160 / 64^7 < 1e-10: the shift is then as fine as the bytes of any model.
SHIFT_ROUNDS = 7
# Chosen, not measured. Stands for a lossless rung, whose log error would be −∞. The lower, the more a place just below such a
# rung promises that rounding down cannot keep.
LEAST_ERROR = 1e-3


@dataclass(frozen=True)
class Bridge:
    """From places on all ladders to bytes and errors, differentiable almost everywhere.

    Attributes:
        bytes_CR: Bytes of every rung, float64; short ladders repeat their last rung.
        log_errors_CR: Natural logarithm of every rung's error, float64.
        last_C: Index of each ladder's last rung, int64.
    """

    bytes_CR: torch.Tensor
    log_errors_CR: torch.Tensor
    last_C: torch.Tensor

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> "Bridge":
        """The bridge of measured curves, at least one."""
        longest = max(len(curve.rungs) for curve in curves)
        padded = [[*c.rungs, *[c.rungs[-1]] * (longest - len(c.rungs))] for c in curves]
        errors_CR = torch.tensor([[r.error for r in row] for row in padded], dtype=torch.float64)
        return cls(
            torch.tensor([[r.num_bytes for r in row] for row in padded], dtype=torch.float64),
            errors_CR.clamp_min(LEAST_ERROR).log(),
            torch.tensor([len(curve.rungs) - 1 for curve in curves]),
        )

    def places(self, arguments_C: torch.Tensor) -> torch.Tensor:
        """Places of sigmoid arguments [..., C], between 0 and the last rung."""
        return self.last_C * torch.sigmoid(arguments_C)

    def num_bytes(self, places_C: torch.Tensor) -> torch.Tensor:
        """Bytes at places [..., C]."""
        return self._between(self.bytes_CR, places_C)

    def errors(self, places_C: torch.Tensor) -> torch.Tensor:
        """Errors at places [..., C]."""
        return self._between(self.log_errors_CR, places_C).exp()

    def _between(self, values_CR: torch.Tensor, places_C: torch.Tensor) -> torch.Tensor:
        low_C = places_C.detach().long()
        curves_C = torch.arange(len(values_CR))
        low_values_C = values_CR[curves_C, low_C]
        high_values_C = values_CR[curves_C, torch.minimum(low_C + 1, self.last_C)]
        return low_values_C + (places_C - low_C) * (high_values_C - low_values_C)


def fcpts(curves: Sequence[Curve], budget_bytes: int, *, num_steps: int = NUM_STEPS) -> Choice:
    """Learn a place on every ladder, round it down and fill what that leaves of the budget.

    Args:
        curves: One per matrix, without dominated rungs.
        budget_bytes: Upper bound of the total, less than all last rungs together.
        num_steps: Of Adam.
    """
    if not curves:
        return []
    bridge = Bridge.of(curves)
    importance_C = torch.tensor([curve.importance for curve in curves], dtype=torch.float64)
    # Adam's ε is absolute: importances may be of any scale.
    importance_C /= importance_C.sum().clamp_min(torch.finfo(torch.float64).tiny)
    thresholds_C = torch.zeros(len(curves), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([thresholds_C], lr=LEARNING_RATE)
    for _ in range(num_steps):
        thresholds_C.grad = constrained_gradient(bridge, importance_C, thresholds_C, budget_bytes)
        optimizer.step()
    places_C = bridge.places(meet_budget(bridge, thresholds_C.detach(), budget_bytes))
    return fill(curves, [int(place) for place in places_C.tolist()], budget_bytes)


def constrained_gradient(
    bridge: Bridge, importance_C: torch.Tensor, thresholds_C: torch.Tensor, budget_bytes: int
) -> torch.Tensor:
    """Gradient of Σ importance · error by the thresholds [C], while the shift keeps the budget."""
    arguments_C = meet_budget(bridge, thresholds_C.detach(), budget_bytes).requires_grad_()
    places_C = bridge.places(arguments_C)
    loss = importance_C @ bridge.errors(places_C)
    (loss_C,) = torch.autograd.grad(loss, arguments_C, retain_graph=True)
    (bytes_C,) = torch.autograd.grad(bridge.num_bytes(places_C).sum(), arguments_C)
    least = torch.finfo(torch.float64).tiny
    return loss_C - bytes_C * (loss_C.sum() / bytes_C.sum().clamp_min(least))


def meet_budget(bridge: Bridge, thresholds_C: torch.Tensor, budget_bytes: int) -> torch.Tensor:
    """Sigmoid arguments t + ν, with the largest common ν that fits, by narrowing an interval."""
    low, high = -LARGEST_SHIFT, LARGEST_SHIFT
    centred_C = thresholds_C - thresholds_C.mean()
    for _ in range(SHIFT_ROUNDS):
        shifts_G = torch.linspace(low, high, SHIFTS_AT_ONCE, dtype=torch.float64)
        places_GC = bridge.places(centred_C + shifts_G.unsqueeze(1))
        fits = int((bridge.num_bytes(places_GC).sum(dim=1) <= budget_bytes).sum())
        low = float(shifts_G[max(fits - 1, 0)])
        high = float(shifts_G[min(max(fits, 1), SHIFTS_AT_ONCE - 1)])
    return centred_C + low
