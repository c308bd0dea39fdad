"""Our GELU is PyTorch's."""

import torch
import torch.nn.functional as F

from model.pft import tanh_gelu


def test_tanh_gelu_is_pytorchs_up_to_rounding_and_at_the_ends() -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e20, -80.0, 80.0, 1e20, torch.inf, torch.nan])])
    torch.testing.assert_close(tanh_gelu(x), F.gelu(x, approximate="tanh"), atol=2e-6, rtol=1e-6, equal_nan=True)
