"""A model whose likelihood is known in closed form, and reproducible noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearDecoder(nn.Module):
    """x = W z + offset, so that p(x) is a Gaussian known in closed form."""

    def __init__(self, weight: Tensor, offset: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.offset, self.shape = nn.Parameter(weight), offset, shape

    def forward(self, latent: Tensor) -> Tensor:
        return (latent @ self.weight.T + self.offset).unflatten(-1, self.shape)
