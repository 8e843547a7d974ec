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
from ucray.training.loss import Coder, frozen_stream

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


def prune(found: Networks, batches: Sequence[Tensor]) -> Networks:
    """The networks without what adds nothing on `batches` (batch, 1, z, y, x); the coder is frozen."""
    batches = batches[:BATCHES]
    for part in DECODERS:
        for name in (part, f"{part}_filter"):
            if getattr(found.config, name) is not None:
                tried = without(found, part, name)
                if _loss(tried, part, batches) <= _loss(found, part, batches) + TOLERANCE:
                    found = tried
    if found.config.analysis is not None:
        loss, counts = _measured(found, "student", batches)
        tried = with_linear_analysis(found, counts.argmax(dim=1))
        if _loss(tried, "student", batches) <= loss + TOLERANCE:
            found = tried
    return found


def without(found: Networks, part: str, name: str) -> Networks:
    """A decoder ("student" or "teacher") without what a `name` of the configuration sizes."""
    config = msgspec.structs.replace(found.config, **{name: None})
    old: LinearSynthesis = getattr(found, part)
    new = synthesis_of(config, part).to(next(old.parameters()).device)
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
    coder = Coder(config)
    folded = {f"prior.networks.{n}.0": 0 for n in range(len(found.coder.prior.networks))}
    _fold(found.coder, coder, vector, folded)
    decoders = []
    for part, old in (("teacher", found.teacher), ("student", found.student)):
        new = synthesis_of(config, part)
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


def _loss(found: Networks, part: str, batches: Sequence[Tensor]) -> float:
    return _measured(found, part, batches)[0]


def _measured(found: Networks, part: str, batches: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Mean over TRIED of log(squared error + lambda * bits a voxel); counts of the codes (stages, codes).

    The error is that of one decoder ("student" or "teacher").
    """
    config = found.config
    decoder: LinearSynthesis = getattr(found, part)
    counts = torch.zeros(config.code_stages, config.codes)
    sums = []
    for quality in TRIED:
        error, bits = 0.0, 0.0
        for x in batches:
            at = torch.full((len(x),), quality, device=x.device)
            with torch.no_grad():
                stream = frozen_stream(found.coder, x, at)
                x_hat = decoder(stream.y_hat, stream.prior, at)
            error += float((x_hat - x).square().sum())
            bits += float(stream.bits.sum())
            for count, codes in zip(counts, stream.codes.unbind(1), strict=True):
                count += torch.bincount(codes.reshape(-1).cpu(), minlength=config.codes)
        sums.append((error, bits, lambda_of(quality)))
    share = counts / counts.sum(dim=1, keepdim=True)
    code_bits = -float(torch.xlogy(counts, share).sum()) / math.log(2.0) / len(TRIED)
    voxels = sum(x.numel() for x in batches)
    losses = [math.log((error + weight * (bits + code_bits)) / voxels) for error, bits, weight in sums]
    return math.fsum(losses) / len(TRIED), counts
