"""One training step of each stage, as modules whose forward gives the loss.

Stage 1, rate-distortion: everything learns, the stream with both syntheses. Stage 2, distillation:
the stream is frozen; the student learns from the data, from the teacher's output and from the
teacher's features (UniCompress, Yang et al. 2024, section 3.3).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ucray.codec.anticipation import anticipated
from ucray.codec.codebook import ResidualCodebook, quantise_codes, vectors_of
from ucray.codec.linear import LinearSynthesis
from ucray.codec.network import Synthesis, analysis_of
from ucray.codec.postfilter import learns_in_bfloat16
from ucray.codec.prior import ContextPrior, lambda_of
from ucray.config import QUALITIES, CodecConfig

COMMITMENT = 0.02
OUTPUT_WEIGHT = 2.0
"""Of the squared difference to what the teacher gives, against that to the data.

Most of what a good teacher misses is noise, and no student will find it: without it a step says more.
"""

FEATURE_WEIGHT = 0.05

STUDENT_SHARE = 0.5
"""Of the student's squared error in that of both decoders, while the stream is trained."""

BALANCE = 0.4
"""Power of lambda that the loss is divided by, so that neither end of the range drowns the other.

The loss itself grows about like the root of lambda; gradients of the finest qualities are the noisiest.
"""


@dataclass(frozen=True)
class Stream:
    """What a decoder gets for one batch, with gradients; codes are (n, stages), bits those of the latents."""

    y_hat: Tensor
    codes: Tensor
    prior: Tensor
    bits: Tensor
    commitment: Tensor


class Coder(nn.Module):
    """Analysis, codebook and prior: chunks to a (differentiable) stream."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.analysis = analysis_of(config)
        self.codebook = ResidualCodebook(config.code_stages, config.codes, config.code_width)
        self.prior = ContextPrior(config)

    def start(self, x: Tensor, quality: Tensor, generator: torch.Generator) -> None:
        """Start prior and codebook from chunks (batch, 1, z, y, x), after the analysis' linear part."""
        self.prior.start(self.analysis.latent_scale)
        with torch.no_grad(), in_fewer_bits(x):
            vectors = self.analysis(x, quality)[1].permute(0, 2, 3, 4, 1)
        self.codebook.start(vectors.flatten(0, 3), generator)

    def coded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (n, stages) of side latents z (batch, width, ...), and the vectors they stand for, like z."""
        codes = quantise_codes(self.codebook.entries, z)
        vectors = vectors_of(self.codebook.entries, codes).movedim(-1, 1)
        return codes.permute(0, 2, 3, 4, 1).flatten(0, 3), vectors

    def forward(self, x: Tensor, quality: Tensor, generator: torch.Generator) -> Stream:
        """Code chunks (batch, 1, z, y, x) at qualities (batch,).

        Rounding passes its gradient straight through; the rate sees noise in its place.
        """
        with in_fewer_bits(x):
            y, z = self.analysis(x, quality)
        vectors = z.permute(0, 2, 3, 4, 1)
        codes, quantised, commitment = self.codebook.learn(vectors.flatten(0, 3), generator)
        side = quantised.reshape(vectors.shape).permute(0, 4, 1, 2, 3)
        noise = torch.rand(y.shape, generator=generator, device=y.device) - 0.5
        coded = self.prior(y, side, quality, noise)
        return Stream(coded.y_hat, codes, side, coded.bits, commitment)


class RateDistortion(nn.Module):
    """Stage 1: loss of a batch, over coder, teacher and student.

    The student reads the stream along with the teacher, so that the stream is one that both can read. Where
    the stream is kept as it is, only they learn.
    """

    def __init__(
        self, coder: Coder, teacher: LinearSynthesis, student: LinearSynthesis, *, keep_stream: bool = False
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = student
        # What is kept stays out of the module tree: it has no gradient.
        self._kept = (coder,) if keep_stream else None
        if not keep_stream:
            self.coder = coder

    def forward(
        self, x: Tensor, quality: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and figures to log: mse of teacher and student (normalised) and bpp, means over the batch."""
        if self._kept is None:
            stream = self.coder(x, quality, generator)
        else:
            with torch.no_grad():
                stream = frozen_stream(*self._kept, self.student, x, quality)
        with in_fewer_bits(x):
            taught = self.teacher(stream.y_hat, stream.prior, quality)
            learnt = self.student(stream.y_hat, stream.prior, quality)
        teacher, student = ((found - x).square().mean(dim=(1, 2, 3, 4)) for found in (taught, learnt))
        mse = teacher + STUDENT_SHARE * (student - teacher)
        bpp = stream.bits / x[0].numel()
        weight = lambda_of(quality)
        loss = ((mse + weight * bpp) / weight**BALANCE).mean() + COMMITMENT * stream.commitment
        figures = {"mse": student.mean(), "teacher_mse": teacher.mean(), "bpp": bpp.mean()}
        return loss, {name: figure.detach() for name, figure in figures.items()}


class Distillation(nn.Module):
    """Stage 2: loss of a batch, over the student alone.

    The teacher says nothing if not `taught`, nor of a chunk that the student already decodes better.
    """

    def __init__(
        self,
        config: CodecConfig,
        coder: Coder,
        teacher: LinearSynthesis,
        student: LinearSynthesis,
        *,
        taught: bool = True,
    ) -> None:
        super().__init__()
        self.student = student
        self._taught = taught
        self.project: nn.Module | None = None
        # What is linear has no features to compare.
        if taught and config.student is not None and config.teacher is not None:
            self.project = nn.Conv3d(config.student.grid_width, config.teacher.grid_width, 1)
        # Frozen parts are kept out of the module tree: they have no gradient and no state to save.
        self._frozen = (coder, teacher)

    def forward(
        self, x: Tensor, quality: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and figures to log: mse of the student and of a teacher that is listened to (normalised)."""
        coder, teacher = self._frozen
        with torch.no_grad():
            stream = frozen_stream(coder, self.student, x, quality)
        with in_fewer_bits(x):
            x_hat, learnt = _decoded(self.student, stream, quality)
        error = (x_hat - x).square().mean(dim=(1, 2, 3, 4))
        figures = {"mse": error.mean().detach()}
        mimic = x.new_zeros(())
        if self._taught:
            with torch.no_grad(), in_fewer_bits(x):
                target, taught = _decoded(teacher, stream, quality)
            taught_error = (target - x).square().mean(dim=(1, 2, 3, 4))
            figures["teacher_mse"] = taught_error.mean()
            # A teacher from elsewhere does harm where the student is ahead of it.
            listens = (taught_error < error.detach()).float()
            error = error + OUTPUT_WEIGHT * listens * (x_hat - target).square().mean(dim=(1, 2, 3, 4))
            if self.project is not None and taught is not None and learnt is not None:
                with in_fewer_bits(x):
                    projected = self.project(learnt)
                mimic = listens.mean() * _difference(projected.float(), taught.float())
        return (error / lambda_of(quality) ** BALANCE).mean() + FEATURE_WEIGHT * mimic, figures


def _decoded(network: LinearSynthesis, stream: Stream, quality: Tensor) -> tuple[Tensor, Tensor | None]:
    """Chunks, and the features on the wavelet grid of a decoder that has any."""
    if not isinstance(network, Synthesis):
        return network(stream.y_hat, stream.prior, quality), None
    features = network.features(stream.y_hat, stream.prior, quality)
    return network.decode(stream.y_hat, features, quality), features


def _difference(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error against the mean square of what is wanted."""
    return functional.mse_loss(found, wanted) / wanted.square().mean().clamp_min(1e-6)


def frozen_stream(coder: Coder, decoder: LinearSynthesis, x: Tensor, quality: Tensor) -> Stream:
    """The stream as it will be coded for a decoder: the encoder's rounding, true codes, no noise."""
    with in_fewer_bits(x):
        y, z = coder.analysis(x, quality)
    codes, side = coder.coded(z)
    step = torch.exp2(-coder.prior.gain_at(quality))
    y = anticipated(y, side, quality, step, coder.analysis, decoder)
    coded = coder.prior(y, side, quality)
    return Stream(coded.y_hat, codes, side, coded.bits, torch.zeros(()))


def draw_quality(batch: int, generator: torch.Generator) -> Tensor:
    """Qualities of one batch (batch,), spread evenly over the whole range so that no end starves."""
    place = generator.device
    places = torch.arange(batch, device=place) + torch.rand(batch, generator=generator, device=place)
    order = torch.randperm(batch, generator=generator, device=place)
    return (places / batch)[order] * (QUALITIES - 1)


def in_fewer_bits(x: Tensor) -> AbstractContextManager[None]:
    """Networks in bfloat16 where there are units made for it: on a GPU, and on some processors."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda or learns_in_bfloat16())
