"""The products on a real GPU, on layers of Mistral-7B's shapes."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_real_layers_products_are_those_of_the_dense_deltas() -> None:
    from benchmarks.gpu_checks import BOUND, check_layers

    assert check_layers() < BOUND
