"""Every network must earn the time that it takes: after training, what adds nothing is left out.

What is tried on training chunks: decoders without their networks, and without their post-filters; an analysis
that is linear, which computes no codes. What is left out is gone for good if the loss stays within TOLERANCE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor, nn

from ucray.codec.context import FEATURE_UNITS, LARGEST_FEATURE
from ucray.codec.linear import LinearSynthesis
from ucray.codec.network import synthesis_of
from ucray.codec.prior import lambda_of
from ucray.config import CodecConfig
from ucray.training.loss import Coder, Stream, frozen_stream

TOLERANCE = 0.002
"""Of the loss, as a share: about half a percent of all bytes, or 0.02 dB."""

TRIED = (16.0, 72.0, 128.0, 184.0, 240.0)
"""Qualities; each has the same say."""

BATCHES = 4


@dataclass(frozen=True)
class Networks:
    """What a training makes: configuration, coder, and the two decoders."""

    config: CodecConfig
    coder: Coder
    teacher: LinearSynthesis
    student: LinearSynthesis


DECODERS = ("student", "teacher")


def prune(found: Networks, batches: Sequence[Tensor], *, keep_coder: bool = False) -> Networks:
    """The networks without what adds nothing on `batches` (batch, 1, z, y, x); the coder is frozen.

    Where it is kept, its networks stay whatever they add.
    """
    measured = _Measured.of(found, batches[:BATCHES])
    for part in DECODERS:
        loss = measured.loss(getattr(found, part))
        for name in (part, f"{part}_filter"):
            if getattr(found.config, name) is None:
                continue
            tried = without(found, part, name)
            # Latents anticipate what the student's filter adds: one that has none has a stream of its own.
            seen = _Measured.of(tried, batches[:BATCHES]) if part == "student" else measured
            reached = seen.loss(getattr(tried, part))
            if reached <= loss + TOLERANCE:
                found, loss, measured = tried, reached, seen
    if found.config.analysis is not None and not keep_coder:
        tried = with_linear_analysis(found, measured.counts.argmax(dim=1))
        reached = _Measured.of(tried, batches[:BATCHES]).loss(tried.student)
        if reached <= measured.loss(found.student) + TOLERANCE:
            found = tried
    return found


def without(found: Networks, part: str, name: str) -> Networks:
    """A decoder ("student" or "teacher") without what a `name` of the configuration sizes."""
    config = msgspec.structs.replace(found.config, **{name: None})
    old: LinearSynthesis = getattr(found, part)
    new = synthesis_of(config, part).to(next(old.parameters()).device).train(old.training)
    kept = old.state_dict()
    new.load_state_dict({name: kept[name] for name in new.state_dict()})
    made = replace(found, config=config)
    return replace(made, student=new) if part == "student" else replace(made, teacher=new)


def with_linear_analysis(found: Networks, codes: Tensor) -> Networks:
    """The analysis' linear part alone; what the codes (stages,) stand for goes into the networks' biases."""
    book = found.coder.codebook
    largest = LARGEST_FEATURE / FEATURE_UNITS
    vector = book.lookup(codes[None].to(book.entries.device))[0].clamp(-largest, largest)
    config = msgspec.structs.replace(found.config, analysis=None, code_stages=0, code_width=0)
    coder = Coder(config).train(found.coder.training)
    folded = {f"prior.networks.{n}.0": 0 for n in range(len(found.coder.prior.networks))}
    _fold(found.coder, coder, vector, folded)
    decoders = []
    for part, old in (("teacher", found.teacher), ("student", found.student)):
        new = synthesis_of(config, part).train(old.training)
        _fold(old, new, vector, {} if getattr(config, part) is None else {"enter": config.latents})
        decoders.append(new)
    teacher, student = decoders
    coder.requires_grad_(False)
    return Networks(config, coder, teacher, student)


def _fold(old: nn.Module, new: nn.Module, vector: Tensor, layers: dict[str, int]) -> None:
    """Load `new` from `old`; of some layers inputs, from a place on, are a constant vector from now on."""
    state = old.state_dict()
    for name, start in layers.items():
        weight = state[f"{name}.weight"]
        constant = slice(start, start + len(vector))
        rows = weight[:, constant].flatten(1)
        state[f"{name}.bias"] = state[f"{name}.bias"] + rows @ vector.to(rows)
        state[f"{name}.weight"] = torch.cat([weight[:, :start], weight[:, constant.stop :]], dim=1)
    wanted = new.state_dict()
    new.load_state_dict({name: state[name] if value.numel() else value for name, value in wanted.items()})
    new.to(vector.device)


@dataclass(frozen=True)
class _Measured:
    """Frozen streams of batches at each quality of TRIED, and counts of their codes (stages, codes)."""

    batches: Sequence[Tensor]
    streams: Sequence[Sequence[Stream]]
    counts: Tensor

    @classmethod
    def of(cls, found: Networks, batches: Sequence[Tensor]) -> _Measured:
        """What the coder of `found` gives."""
        config = found.config
        counts = torch.zeros(config.code_stages, config.codes)
        with torch.no_grad():
            streams = [
                [frozen_stream(found.coder, found.student, x, _qualities(x, quality)) for x in batches]
                for quality in TRIED
            ]
        for stream in (one for row in streams for one in row):
            for count, codes in zip(counts, stream.codes.unbind(1), strict=True):
                count += torch.bincount(codes.reshape(-1).cpu(), minlength=config.codes)
        return cls(batches, streams, counts)

    def loss(self, decoder: LinearSynthesis) -> float:
        """Mean over TRIED of log(squared error + lambda * bits a voxel), the codes counted in."""
        share = self.counts / self.counts.sum(dim=1, keepdim=True)
        code_bits = -float(torch.xlogy(self.counts, share).sum()) / math.log(2.0) / len(TRIED)
        voxels = sum(x.numel() for x in self.batches)
        losses = []
        for quality, row in zip(TRIED, self.streams, strict=True):
            error, bits = 0.0, code_bits
            for x, stream in zip(self.batches, row, strict=True):
                with torch.no_grad():
                    x_hat = decoder(stream.y_hat, stream.prior, _qualities(x, quality))
                error += float((x_hat - x).square().sum())
                bits += float(stream.bits.sum())
            losses.append(math.log((error + lambda_of(quality) * bits) / voxels))
        return math.fsum(losses) / len(TRIED)


def _qualities(x: Tensor, quality: float) -> Tensor:
    return torch.full((len(x),), quality, device=x.device)
