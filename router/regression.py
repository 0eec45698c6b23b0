"""Multinomial logistic regression on a sparse and a dense block.

scikit-learn's takes one matrix: with a few hundred dense columns beside many sparse ones, either
form costs several times the arithmetic that is needed. The problem is the same:

    minimise  sum_n w_n * -log softmax(x_n W + b)[y_n]  +  penalty / 2 * |W|^2

by L-BFGS (Liu and Nocedal 1989), the bias without a penalty. The result is centred over the
domains, which softmax ignores.

Shapes: N prompts, S sparse and K dense columns, D domains.
"""

from typing import Any, Final

import numpy as np

from deltamux.router.metrics import Labels
from deltamux.router.tables import Floats, Probabilities

_MAX_ITERATIONS: Final = 200
#: Relative decrease of the objective at which to stop.
_TOLERANCE: Final = 1e-6


def fit_regression(
    sparse: Any,
    dense: Floats,
    truth: Labels,
    weights: Probabilities,
    *,
    penalty: float,
    offset: Floats | None = None,
) -> tuple[Probabilities, Probabilities]:
    """Fit.

    Args:
        sparse: CSR float32 [N, S].
        dense: Float32 [N, K].
        truth: Int64 [N], in 0..D-1.
        weights: Float64 [N], of the prompts.
        penalty: Of the squared weights.
        offset: Float32 [N, D], added to the scores; None for nothing.

    Returns:
        Float64 [S + K, D] weights and [D] bias.
    """
    from scipy.optimize import minimize
    from threadpoolctl import threadpool_limits

    num_sparse, num_columns = sparse.shape[1], sparse.shape[1] + dense.shape[1]
    num_domains = int(truth.max()) + 1
    transposed = sparse.T.tocsr()
    total = float(weights.sum())
    each = (weights / total).astype(np.float32)[:, None]
    wanted = np.eye(num_domains, dtype=np.float32)[truth]
    decay = penalty / total

    def objective(flat: Probabilities) -> tuple[float, Probabilities]:
        exact = flat.reshape(num_columns + 1, num_domains)
        now = exact.astype(np.float32)
        scores = sparse @ now[:num_sparse] + dense @ now[num_sparse:-1] + now[-1]
        if offset is not None:
            scores += offset
        scores -= scores.max(axis=1, keepdims=True)
        powers = np.exp(scores)
        sums = powers.sum(axis=1, keepdims=True)
        misfit = np.log(sums) - (scores * wanted).sum(axis=1, keepdims=True)
        error = each * (powers / sums - wanted)
        slopes = [transposed @ error, dense.T @ error, error.sum(axis=0, keepdims=True)]
        gradient = np.concatenate(slopes, dtype=np.float64)
        gradient[:-1] += decay * exact[:-1]
        loss = float((each * misfit).sum(dtype=np.float64))
        return loss + decay / 2 * float((exact[:-1] ** 2).sum()), gradient.ravel()

    # The products are narrow: more BLAS threads would only wait for each other.
    with threadpool_limits(limits=1):
        found = minimize(
            objective,
            np.zeros((num_columns + 1) * num_domains),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _MAX_ITERATIONS, "ftol": _TOLERANCE, "gtol": 1e-6},
        )
    result = found.x.reshape(num_columns + 1, num_domains)
    result -= result.mean(axis=1, keepdims=True)
    return result[:-1], result[-1]
