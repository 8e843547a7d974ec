"""SOAP: faster than Adam where directions matter, Adam where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ucray.training.soap import VECTOR_BETAS, Soap


def _ill_conditioned(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target and two rotated metrics whose eigenvalues span four orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    metrics = []
    for _ in range(2):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        metrics.append(basis @ torch.diag(torch.logspace(0, -2, size)) @ basis.T)
    return torch.randn(size, size, generator=generator), metrics[0], metrics[1]


def _final_loss(optimizer: type[Soap] | type[torch.optim.AdamW], steps: int) -> float:
    target, left, right = _ill_conditioned(12)
    parameter = nn.Parameter(torch.zeros_like(target))
    chosen = optimizer([{"params": [parameter]}], lr=0.05, weight_decay=0.0)
    for step in range(steps):
        for group in chosen.param_groups:
            group["lr"] = 0.05 * (1.0 - step / steps)
        chosen.zero_grad()
        loss = (left @ (parameter - target) @ right).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        chosen.step()
    return float(loss.detach())


def test_it_finds_the_directions_that_adam_does_not() -> None:
    assert _final_loss(Soap, 400) < 0.2 * _final_loss(torch.optim.AdamW, 400)


@pytest.mark.parametrize("shape", [(5,), (3, 4)], ids=["vector", "table"])
def test_what_has_no_directions_gets_adam(shape: tuple[int, ...]) -> None:
    gradients = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    ours, adams = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    soap = Soap([{"params": [ours], "turned": False}], lr=0.1, weight_decay=0.05)
    adam = torch.optim.AdamW([adams], lr=0.1, betas=VECTOR_BETAS, weight_decay=0.05)
    for gradient in gradients:
        ours.grad, adams.grad = gradient.clone(), gradient.clone()
        soap.step()
        adam.step()
    torch.testing.assert_close(ours, adams)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3, 3), (4, 600)])
def test_a_step_is_as_large_as_adams(shape: tuple[int, ...]) -> None:
    """In the eigenbasis every entry moves by about the learning rate."""
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.zeros(shape))
    soap = Soap([{"params": [parameter]}], lr=0.01, weight_decay=0.0)
    moved = []
    for _ in range(30):
        before = parameter.detach().clone()
        parameter.grad = torch.randn(shape, generator=generator) + 1.0
        soap.step()
        moved.append(float((parameter.detach() - before).square().mean().sqrt()))
    assert moved[0] == 0.0
    assert 0.001 < max(moved[1:]) < 0.02


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 3e-6])
def test_gradients_however_small_leave_numbers(size: float) -> None:
    """A network that hardly matters: its covariances are tiny and of low rank."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.ones(48, 48))
    soap = Soap([{"params": [parameter]}], lr=0.01)
    for _ in range(25):
        left, right = (torch.randn(48, 2, generator=generator) for _ in range(2))
        parameter.grad = size * (left @ right.T)
        soap.step()
    assert torch.isfinite(parameter).all()


def test_parameters_without_a_gradient_stay() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    Soap([{"params": [parameter]}], lr=0.1).step()
    assert parameter.tolist() == [[1.0, 1.0], [1.0, 1.0]]
