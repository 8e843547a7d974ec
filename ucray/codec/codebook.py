"""Residual vector quantisation against a learned codebook: the frequency prior.

The side latents z, computed from wavelet coefficients, are quantised in stages; each stage codes
what the stages before it left over. The codes condition the INR (Yang et al. 2024, section 3.2) and
the context model. Codebook entries follow the data by exponential moving
averages (van den Oord et al. 2017, appendix A.1); codes that fall out of use restart on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

EMA_DECAY = 0.99
"""Weight of the past in the moving averages of code usage."""

DEAD_SHARE = 0.05
"""A code restarts once it is used less than this share of an even spread over all codes."""


class ResidualCodebook(nn.Module):
    """`stages` codebooks of `codes` entries of `width` numbers each.

    Entries live in `entries` (stages, codes, width), float32.
    """

    entries: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, stages: int, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(stages, codes, width))
        self.register_buffer("counts", torch.ones(stages, codes))
        self.register_buffer("sums", torch.zeros(stages, codes, width))

    def quantise(self, vectors: Tensor) -> Tensor:
        """Nearest codes, stage by stage: vectors (n, width) to codes (n, stages), int64."""
        return _quantise(self.entries, vectors)

    def lookup(self, codes: Tensor) -> Tensor:
        """Sum of the chosen entries: codes (n, stages) to vectors (n, width)."""
        return vectors_of(self.entries, codes)

    def learn(self, vectors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One training step: returns (codes, quantised vectors with straight-through gradient, loss).

        The loss pulls `vectors` (n, width) towards the entries they chose ("commitment"); entries
        move by moving averages over all workers of a distributed run, without a gradient.
        """
        with torch.no_grad():
            codes = self.quantise(vectors)
            quantised = self.lookup(codes)
            self._follow(vectors.detach(), codes, generator)
        commitment = functional.mse_loss(vectors, quantised) if vectors.numel() else vectors.sum()
        return codes, vectors + (quantised - vectors).detach(), commitment

    def start(self, vectors: Tensor, generator: torch.Generator) -> None:
        """Start the entries from vectors (n, width)."""
        residual = vectors
        for stage, entries in enumerate(self.entries):
            picked = residual[_pick(len(residual), len(entries), generator)]
            self.entries[stage] = picked + 1e-3 * picked.std() * _normal(picked, generator)
            residual = residual - self.entries[stage][_nearest(residual, self.entries[stage])]
        self.sums.copy_(self.entries)

    def _follow(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        residual = vectors
        for stage in range(len(self.entries)):
            chosen = codes[:, stage]
            # Not bincount: on a GPU it would wait for all that was asked before.
            ones = torch.ones_like(chosen, dtype=residual.dtype)
            count = torch.zeros_like(self.counts[stage]).index_add_(0, chosen, ones)
            total = torch.zeros_like(self.sums[stage]).index_add_(0, chosen, residual)
            pool = _gathered(residual)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(count)
                distributed.all_reduce(total)
            usage = count * (self.counts.shape[1] / len(pool))
            self.counts[stage].mul_(EMA_DECAY).add_(usage, alpha=1 - EMA_DECAY)
            self.sums[stage].mul_(EMA_DECAY).add_(
                total * (self.counts.shape[1] / len(pool)), alpha=1 - EMA_DECAY
            )
            dead = self.counts[stage] < DEAD_SHARE
            fresh = pool[_pick(len(pool), len(dead), generator)]
            self.sums[stage] = torch.where(dead[:, None], fresh, self.sums[stage])
            self.counts[stage].masked_fill_(dead, 1.0)
            before = self.entries[stage][chosen]
            self.entries[stage] = self.sums[stage] / self.counts[stage][:, None]
            residual = residual - before


def spread(vectors: Tensor, shape: Sequence[int]) -> Tensor:
    """Vectors (batch, width, z, y, x) on the grid of codes, each repeated over its cells of a finer grid."""
    for axis, (cells, codes) in enumerate(zip(shape, vectors.shape[2:], strict=True), start=2):
        vectors = vectors.repeat_interleave(cells // codes, dim=axis)
    return vectors


def quantise_codes(entries: Tensor, z: Tensor) -> Tensor:
    """Codes of side latents (batch, width, z, y, x): int64 (batch, stages, z, y, x)."""
    vectors = z.permute(0, 2, 3, 4, 1)
    flat = _quantise(entries, vectors.flatten(0, 3))
    return flat.reshape(*vectors.shape[:4], len(entries)).permute(0, 4, 1, 2, 3)


def vectors_of(entries: Tensor, codes: Tensor) -> Tensor:
    """What codes (n, stages, ...) stand for: sums of entries (n, ..., width)."""
    total = entries.new_zeros(*codes.shape[:1], *codes.shape[2:], entries.shape[2])
    for book, code in zip(entries, codes.unbind(1), strict=True):
        total = total + book[code]
    return total


def _quantise(entries: Tensor, vectors: Tensor) -> Tensor:
    codes = []
    for book in entries:
        nearest = _nearest(vectors, book)
        vectors = vectors - book[nearest]
        codes.append(nearest)
    return torch.stack(codes, dim=1) if codes else vectors.new_zeros(len(vectors), 0, dtype=torch.int64)


def _nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    distance = entries.square().sum(dim=1) - 2.0 * vectors @ entries.T
    return distance.argmin(dim=1)


def _pick(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    return torch.randint(available, (wanted,), generator=generator, device=generator.device)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def _gathered(vectors: Tensor) -> Tensor:
    """The vectors of all workers of a distributed run, in rank order; alone, the vectors."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, vectors.contiguous())
    return torch.cat(parts)
