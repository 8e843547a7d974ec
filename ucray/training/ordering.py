"""Context networks for an order of coding that weights to start from did not have.

Only the first group is ever coded in another order, in the context of nothing but itself; so its networks are
learnt by themselves, on latents that stay as they are, in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from msgspec.structs import replace
from torch import Tensor

from ucray.codec.passes import Pass
from ucray.codec.prior import ContextPrior
from ucray.config import QUALITIES, CodecConfig
from ucray.training.loss import Coder, draw_quality, in_fewer_bits
from ucray.training.schedule import share_of_rate

ORDER_CHUNKS = 512
"""Chunks to learn from: of each cell only the first group's channels are kept."""

STEPS = 400
BATCH = 24
LEARNING_RATE = 3e-3


def learn_order(
    coder: Coder,
    missing: Sequence[Pass],
    config: CodecConfig,
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> None:
    """Train the networks of the `missing` passes, of the first group, on chunks (batch, 1, z, y, x)."""
    prior, channels = coder.prior, config.groups[0]
    latents, vectors = [], []
    for x in batches:
        with torch.no_grad(), in_fewer_bits(x):
            y, z = coder.analysis(x, draw_quality(len(x), generator))
        latents.append(y[:, :channels])
        vectors.append(coder.coded(z)[1])
    y, side = torch.cat(latents), torch.cat(vectors)
    alone = ContextPrior(replace(config, groups=config.groups[:1], checkered=1)).to(y.device)
    with torch.no_grad():
        alone.base.copy_(prior.base[:channels])
        alone.log_gain.copy_(prior.log_gain[:, :channels])
        alone.deviation.copy_(prior.deviation[:channels])
    alone.requires_grad_(False)
    learning = []
    for part, network, stored in zip(alone.passes, alone.networks, prior.networks, strict=False):
        network.load_state_dict(stored.state_dict())
        if part in missing:
            learning += list(network.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(learning, LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share_of_rate(step, STEPS)
        chosen = torch.randint(len(y), (BATCH,), generator=generator, device=y.device)
        seen = y[chosen]
        quality = torch.rand(BATCH, generator=generator, device=y.device) * (QUALITIES - 1)
        noise = torch.rand(seen.shape, generator=generator, device=y.device) - 0.5
        bits = alone(seen, side[chosen], quality, noise).bits / seen[0].numel()
        # Fine qualities take more bits; what an order saves is as many at all of them.
        bits.mean().backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for network, stored in zip(alone.networks, prior.networks, strict=False):
            stored.load_state_dict(network.state_dict())
