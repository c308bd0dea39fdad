"""Linear layers: how many rows there are changes none of them."""

import pytest
import torch

from model.linear import FEW_ROWS, Linear
from tests.rounding import products_are_alike


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_comes_out_the_same_however_many_there_are(bias: bool) -> None:
    if not products_are_alike():
        pytest.skip("this machine's matrix products depend on the number of rows, even of whole blocks")
    torch.manual_seed(0)
    layer, rows = Linear(96, 192, bias=bias), torch.randn(2 * FEW_ROWS, 96)
    every = layer(rows)
    for count in range(1, len(rows)):
        assert torch.equal(layer(rows[:count]), every[:count]), count
        assert torch.equal(layer(rows[-count:]), every[-count:]), count


@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (FEW_ROWS + 1, 8), (2, 5, 8)])
def test_it_is_a_linear_layer(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Linear(8, 3)
    x = torch.randn(shape, requires_grad=True)
    made = layer(x)
    torch.testing.assert_close(made, x @ layer.weight.T + layer.bias)
    made.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(shape))
