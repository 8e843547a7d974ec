"""Context networks for passes that weights to start from did not have, on latents that stay as they are.

That is another order of the first group, which is coded in the context of nothing but itself, so that its
networks are learnt by themselves in seconds; or groups that were added.
"""

from __future__ import annotations

import itertools
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
"""Chunks to learn from: of each cell only the channels that are needed are kept."""

STEPS = 400
BATCH, LARGE_BATCH = 4, 24
"""Chunks a step; the first group alone, which has few latents, takes the more."""

LEARNING_RATE = 3e-3


def learn_passes(
    coder: Coder,
    missing: Sequence[Pass],
    config: CodecConfig,
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> None:
    """Train the networks of the `missing` passes on chunks (batch, 1, z, y, x)."""
    prior, channels = coder.prior, max(part.last for part in missing)
    count = 1 + list(itertools.accumulate(config.groups)).index(channels)
    latents, vectors = [], []
    for x in batches:
        with torch.no_grad(), in_fewer_bits(x):
            y, z = coder.analysis(x, draw_quality(len(x), generator))
        latents.append(y[:, :channels])
        vectors.append(coder.coded(z)[1])
    y, side = torch.cat(latents), torch.cat(vectors)
    checkered = min(count, config.checkered)
    alone = ContextPrior(replace(config, groups=config.groups[:count], checkered=checkered)).to(y.device)
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
    batch = LARGE_BATCH if count == 1 else BATCH
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * share_of_rate(step, STEPS)
        chosen = torch.randint(len(y), (batch,), generator=generator, device=y.device)
        seen = y[chosen]
        quality = torch.rand(batch, generator=generator, device=y.device) * (QUALITIES - 1)
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
