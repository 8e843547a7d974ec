"""One training step of each stage, as modules whose forward gives the loss.

Stage 1, rate-distortion: everything learns with the teacher's synthesis. Stage 2, distillation:
the stream is frozen; the student learns from the data, from the teacher's output and from the
teacher's features (UniCompress, Yang et al. 2024, section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.codebook import ResidualCodebook, quantise_codes
from ucray.codec.network import Analysis, Synthesis
from ucray.codec.prior import ContextPrior, lambda_of
from ucray.config import QUALITIES, CodecConfig

COMMITMENT = 0.02
OUTPUT_WEIGHT = 0.5
FEATURE_WEIGHT = 0.05

BALANCE = 0.4
"""Power of lambda that the loss is divided by, so that neither end of the range drowns the other.

The loss itself grows about like the root of lambda; gradients of the finest qualities are the noisiest.
"""


@dataclass(frozen=True)
class Stream:
    """What a decoder gets for one batch, with gradients: latents, prior; and bits."""

    y_hat: Tensor
    prior: Tensor
    bits: Tensor
    commitment: Tensor


class Coder(nn.Module):
    """Analysis, codebook and prior: chunks to a (differentiable) stream."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.analysis = Analysis(config)
        self.codebook = ResidualCodebook(config.code_stages, config.codes, config.code_width)
        self.prior = ContextPrior(config)

    def forward(self, x: Tensor, quality: Tensor, generator: torch.Generator) -> Stream:
        """Code chunks (batch, 1, z, y, x) at qualities (batch,).

        Rounding passes its gradient straight through; the rate sees noise in its place.
        """
        y, z = self.analysis(x)
        vectors = z.permute(0, 2, 3, 4, 1)
        _, quantised, commitment = self.codebook.learn(vectors.reshape(-1, vectors.shape[-1]), generator)
        side = quantised.reshape(vectors.shape).permute(0, 4, 1, 2, 3)
        noise = torch.rand(y.shape, generator=generator).to(y) - 0.5
        coded = self.prior(y, side, quality, noise)
        return Stream(coded.y_hat, side, coded.bits, commitment)


class RateDistortion(nn.Module):
    """Stage 1: loss of a batch, over coder and teacher."""

    def __init__(self, coder: Coder, teacher: Synthesis) -> None:
        super().__init__()
        self.coder = coder
        self.teacher = teacher

    def forward(
        self, x: Tensor, quality: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and figures to log: mse (normalised) and bpp, means over the batch."""
        stream = self.coder(x, quality, generator)
        x_hat = self.teacher(stream.y_hat, stream.prior, quality)
        mse = (x_hat - x).square().mean(dim=(1, 2, 3, 4))
        bpp = stream.bits / x[0].numel()
        weight = torch.tensor([lambda_of(float(q)) for q in quality]).to(x)
        loss = ((mse + weight * bpp) / weight**BALANCE).mean() + COMMITMENT * stream.commitment
        return loss, {"mse": mse.mean().detach(), "bpp": bpp.mean().detach()}


class Distillation(nn.Module):
    """Stage 2: loss of a batch, over the student alone; without the teacher's share if not `taught`."""

    def __init__(
        self,
        config: CodecConfig,
        coder: Coder,
        teacher: Synthesis,
        student: Synthesis,
        *,
        taught: bool = True,
    ) -> None:
        super().__init__()
        self.student = student
        self._output_weight = OUTPUT_WEIGHT if taught else 0.0
        self._feature_weight = FEATURE_WEIGHT if taught else 0.0
        self.project = nn.Conv3d(config.student.grid_width, config.teacher.grid_width, 1)
        # Frozen parts are kept out of the module tree: they have no gradient and no state to save.
        self._frozen = (coder, teacher)

    def forward(
        self, x: Tensor, quality: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and figures to log: mse of the student and of the teacher (normalised)."""
        coder, teacher = self._frozen
        with torch.no_grad():
            stream = frozen_stream(coder, x, quality)
            teacher_features = teacher.features(stream.y_hat, stream.prior, quality)
            target = teacher.decode(stream.y_hat, teacher_features, quality)
        features = self.student.features(stream.y_hat, stream.prior, quality)
        x_hat = self.student.decode(stream.y_hat, features, quality)
        data = (x_hat - x).square().mean(dim=(1, 2, 3, 4))
        output = (x_hat - target).square().mean(dim=(1, 2, 3, 4))
        weight = torch.tensor([lambda_of(float(q)) for q in quality]).to(x)
        mimic = functional.mse_loss(self.project(features), teacher_features)
        mimic = mimic / teacher_features.square().mean().clamp_min(1e-6)
        loss = ((data + self._output_weight * output) / weight**BALANCE).mean() + self._feature_weight * mimic
        teacher_mse = (target - x).square().mean()
        return loss, {"mse": data.mean().detach(), "teacher_mse": teacher_mse.detach()}


def frozen_stream(coder: Coder, x: Tensor, quality: Tensor) -> Stream:
    """The stream as it will be coded: the encoder's rounding, true codes, no noise, no learning."""
    y, z = coder.analysis(x)
    codes = quantise_codes(coder.codebook.entries, z).permute(0, 2, 3, 4, 1)
    side = coder.codebook.lookup(codes.reshape(-1, codes.shape[-1])).reshape(*codes.shape[:4], -1)
    side = side.permute(0, 4, 1, 2, 3)
    coded = coder.prior(y, side, quality)
    return Stream(coded.y_hat, side, coded.bits, torch.zeros(()))


def draw_quality(batch: int, generator: torch.Generator) -> Tensor:
    """Qualities of one batch (batch,), spread evenly over the whole range so that no end starves."""
    places = torch.arange(batch) + torch.rand(batch, generator=generator)
    return (places / batch)[torch.randperm(batch, generator=generator)] * (QUALITIES - 1)
