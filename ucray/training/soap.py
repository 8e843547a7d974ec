"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

Vyas et al. 2024, arXiv 2409.11321, algorithm 3. Matrices, and convolutions as matrices, are turned on
both sides; vectors get plain Adam. What it costs and gives is in `ucray/codec/EXPERIMENTS.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

BETA = 0.95
"""Decay of both moments and of the covariances where the basis turns."""

VECTOR_BETAS = (0.9, 0.98)
"""Decays of the moments of vectors: entries of a table meet few of the chunks, so they remember longer."""

TURN_EVERY = 10
"""Steps between two turns of the basis."""

JOINED_SIDE = 512
"""A kernel's places and inputs are turned together where they are no more than this."""

EPSILON = 1e-8


class Soap(torch.optim.Optimizer):
    """SOAP with decoupled weight decay.

    Parameters
    ----------
    groups
        Parameter groups with "params"; "weight_decay" of their own where wanted, and "turned": False
        for tables, whose rows and columns are no directions.
    lr
        Learning rate: the size of a step, as in Adam.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "turned": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient; of matrices the first step only learns the basis."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, parameter.grad, group)

    def _change(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        turned = group["turned"] and parameter.dim() > 1
        seen = _sides(gradient) if turned else gradient
        if not state:
            state["step"] = torch.zeros(())
            state |= {name: torch.zeros_like(seen) for name in ("mean", "square")}
            if turned:
                for side, covariance in zip(("left", "right"), _covariances(seen), strict=True):
                    state[side] = covariance * (1.0 - BETA)
                    state[f"{side}_basis"] = _eigenbasis(covariance)
                return
        state["step"] += 1
        step = int(state["step"])
        first, second = (BETA, BETA) if turned else VECTOR_BETAS
        mean, square = state["mean"].lerp_(seen, 1.0 - first), state["square"]
        if turned:
            bases = state["left_basis"], state["right_basis"]
            square.lerp_(_turn(seen, bases[0].T, bases[1]).square(), 1.0 - second)
            change = _turn(mean, bases[0].T, bases[1]) / (square.sqrt() + EPSILON)
            change = _turn(change, bases[0], bases[1].T)
        else:
            square.lerp_(seen.square(), 1.0 - second)
            change = mean / (square.sqrt() + EPSILON)
        correction = math.sqrt(1.0 - second**step) / (1.0 - first**step)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        change = _unsided(change, parameter) if turned else change
        parameter.add_(change, alpha=-group["lr"] * correction)
        if turned:
            for side, covariance in zip(("left", "right"), _covariances(seen), strict=True):
                state[side].lerp_(covariance, 1.0 - BETA)
            if step % TURN_EVERY == 0:
                self._turn_bases(state)

    def _turn_bases(self, state: dict[str, Tensor]) -> None:
        """One step of power iteration towards the eigenvectors, the largest first."""
        for side, axis in (("left", 0), ("right", -1)):
            basis = state[f"{side}_basis"]
            image = state[side] @ basis
            order = (basis * image).sum(dim=0).argsort(descending=True)
            state["square"] = state["square"].index_select(axis, order)
            state[f"{side}_basis"] = torch.linalg.qr(image[:, order])[0]


def _sides(values: Tensor) -> Tensor:
    """A matrix or kernel (outputs, inputs, ...) as (outputs, places, inputs), its places joined if few."""
    kernel = values.reshape(*values.shape[:2], -1).transpose(1, 2)
    joined = kernel.shape[1] * kernel.shape[2] <= JOINED_SIDE
    return kernel.reshape(len(kernel), 1, -1) if joined else kernel.contiguous()


def _unsided(sides: Tensor, like: Tensor) -> Tensor:
    """Undo `_sides`."""
    return sides.reshape(len(like), -1, like.shape[1]).transpose(1, 2).reshape(like.shape)


def _covariances(sides: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = sides.flatten(1), sides.flatten(0, 1)
    return rows @ rows.T, columns.T @ columns


def _eigenbasis(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest first.

    LAPACK in float32 gives no numbers for matrices as small as those of a network that hardly matters.
    """
    largest = covariance.abs().max().double().clamp_min(torch.finfo(torch.float64).tiny)
    vectors = torch.linalg.eigh(covariance.double() / largest)[1]
    return torch.as_tensor(vectors.flip(1).to(covariance.dtype).contiguous())


def _turn(sides: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (left @ (sides @ right).flatten(1)).view(sides.shape)
