"""Convolutions of a single chunk as fast as those of several.

PyTorch leaves a batch of one small volume to a plain path that is several times slower than oneDNN's
and rounds differently. Asked for by name, oneDNN gives one chunk the very numbers that it would have
in any batch: what a chunk decodes to then depends on nothing but the chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_ONE_DNN = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


class Convolution(nn.Conv3d):
    """A convolution of zero padding, by oneDNN wherever it is there and no gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        """Features (batch, width, z, y, x)."""
        return self.with_weights(x, self.weight, self.bias)

    def with_weights(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        relu: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor:
        """The same with weights and bias for this once; with a ReLU, or added onto others, which are lost.

        oneDNN does that before it writes: a pass over memory less.
        """
        geometry = self.padding, self.stride, self.dilation, self.groups
        if torch.is_grad_enabled() or x.is_cuda or not _ONE_DNN:
            return finished(self._conv_forward(x, weight, bias), relu=relu, onto=onto)
        if onto is not None:
            added = torch.ops.mkldnn._convolution_pointwise_.binary(
                onto, x, weight, bias, *geometry, "add", 1.0, None, [], ""
            )
            return torch.as_tensor(added)
        behind = "relu" if relu else "none"
        return torch.as_tensor(
            torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, behind, [], "")
        )


def finished(found: Tensor, *, relu: bool, onto: Tensor | None) -> Tensor:
    """Features behind a convolution, with a ReLU or added onto others."""
    if onto is not None:
        return onto + found
    return functional.relu(found, inplace=True) if relu else found
