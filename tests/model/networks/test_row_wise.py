"""Linear layers and activations: the number of rows does not change any row's result."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from patchforge.model.networks.row_wise import FEW_ROWS, Linear, tanh_gelu
from tests.rounding import products_are_alike


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that compute pictures have one OpenMP thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_row_comes_out_of_a_layer_the_same_however_many_there_are(bias: bool) -> None:
    if not products_are_alike():
        pytest.skip("this machine's matrix products depend on the number of rows, even of whole blocks")
    torch.manual_seed(0)
    layer, rows = Linear(96, 192, bias=bias), torch.randn(2 * FEW_ROWS, 96)
    every = layer(rows)
    for count in range(1, len(rows)):
        assert torch.equal(layer(rows[:count]), every[:count]), count
        assert torch.equal(layer(rows[-count:]), every[-count:]), count


@pytest.mark.parametrize("activation", [F.silu, tanh_gelu])
@pytest.mark.parametrize("width", [576, 768])
@torch.no_grad()
def test_and_out_of_an_activation(activation: Callable[[Tensor], Tensor], width: int) -> None:
    rows = torch.randn(400, width, generator=torch.Generator().manual_seed(0))
    every = activation(rows)
    for count in (43, 64, 100, 171, 200, 256, 333):
        assert torch.equal(activation(rows[:count]), every[:count]), count


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (FEW_ROWS + 1, 8), (2, 5, 8)])
def test_it_is_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Linear(8, 3)
    x = torch.randn(shape, requires_grad=True)
    made = layer(x)
    torch.testing.assert_close(made, x @ layer.weight.T + layer.bias)
    made.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(shape))


@torch.no_grad()
def test_the_activation_is_pytorchs_up_to_rounding_and_at_the_ends() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e20, -80.0, 80.0, 1e20, torch.inf, torch.nan])])
    torch.testing.assert_close(tanh_gelu(x), F.gelu(x, approximate="tanh"), atol=2e-6, rtol=1e-6, equal_nan=True)


def test_training_uses_pytorchs_own() -> None:
    x = torch.tensor([-200.0, -1.0, 3.0], requires_grad=True)
    assert torch.equal(tanh_gelu(x), F.gelu(x, approximate="tanh"))
    tanh_gelu(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_a_compiled_layer_is_not_compiled_anew_for_every_number_of_rows() -> None:
    layer, counter = Linear(8, 3), CompileCounter()
    compiled = torch.compile(layer, backend=counter, dynamic=True)
    with warnings.catch_warnings(action="ignore"):
        for rows in (2, 3, 4, 5, 7, 8, 130, 131):
            torch.testing.assert_close(compiled(torch.ones(rows, 8)), layer(torch.ones(rows, 8)))
    assert counter.frame_count == 1
