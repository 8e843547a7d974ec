"""Shapes of the networks and of the stream, checked where they are parsed."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ucray.errors import SettingsError
from ucray.grid import Shape3, triple

QUALITIES = 256
"""Number of quality settings; quality 0 is the coarsest."""

Width = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Depth = Annotated[int, msgspec.Meta(ge=0, le=64)]
Step = Annotated[int, msgspec.Meta(ge=1, le=8)]
Level = Annotated[int, msgspec.Meta(ge=0, le=4)]
TrellisStates = Literal[8, 256]
Sizes = TypeVar("Sizes", bound=msgspec.Struct)


class AnalysisConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widths (channels) and depths (residual blocks) of the analysis network g_a."""

    grid_width: Width = 32
    grid_blocks: Depth = 1
    latent_width: Width = 96
    latent_blocks: Depth = 2


class SynthesisConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Widths and depths of one synthesis network: latent grid, wavelet grid, then the INR."""

    latent_width: Width
    latent_blocks: Depth
    grid_width: Width
    grid_blocks: Depth
    inr_width: Width

    @classmethod
    def parse(cls, text: str) -> SynthesisConfig:
        """From its numbers in their order, as "32,1,16,1,4"; raises SettingsError where they are others."""
        return _numbers(cls, text, "a synthesis network")


class FilterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Width (channels) and layers of a post-filter, and the finest quality at which it is worth its time.

    `cell` are the voxels (z, y, x) that share a feature's place, with which layers come in pairs; without it
    they are two along each axis that the wavelet halves, and layers come one by one. Twice as wide on cells
    four times as large, and in pairs, a filter takes half the time.
    """

    width: Width
    layers: Depth
    finest: Annotated[int, msgspec.Meta(ge=0, lt=QUALITIES)] = 160
    cell: tuple[Step, Step, Step] | None = None

    def __post_init__(self) -> None:
        if self.cell is not None and self.layers % 2:
            raise ValueError("layers of a filter with a cell come in pairs")

    @classmethod
    def parse(cls, text: str) -> FilterConfig:
        """From its numbers in their order, as "16,2,160" or, with a cell, "32,6,160,2,4,4".

        Raises SettingsError where they are others.
        """
        try:
            width, layers, finest, *cell = map(int, text.split(","))
            found = {"width": width, "layers": layers, "finest": finest, "cell": cell or None}
            return msgspec.convert(found, cls)
        except (ValueError, msgspec.ValidationError):
            wanted = "width, layers, finest and, if not that of old, the voxels z, y, x of a cell"
            raise SettingsError(f"{text!r} does not size a post-filter; give {wanted}") from None


def _numbers(cls: type[Sizes], text: str, what: str) -> Sizes:
    names = cls.__struct_fields__
    parts = text.split(",")
    try:
        if len(parts) != len(names):
            raise ValueError
        numbers = dict(zip(names, map(int, parts), strict=True))
        return msgspec.convert(numbers, cls)
    except (ValueError, msgspec.ValidationError):
        wanted = ", ".join(name.replace("_", " ") for name in names)
        raise SettingsError(f"{text!r} does not size {what}; give {wanted}") from None


class CodecConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that fixes the shape of the networks and of the stream.

    `levels` are wavelet levels per axis (z, y, x); `latent_stride` leads from the wavelet grid to
    the latent grid and `code_stride` from there to the grid of codebook codes. Latents are coded in
    `groups` of channels, each in the context of those before it; the first `checkered` groups are
    coded in two halves, as the squares of a checkerboard, the second in the context of the first.

    Without sizes the analysis, the teacher or the student is its linear part alone; without sizes of a
    filter a decoder has none. A linear analysis computes no codes: `code_stages` and `code_width` are zero
    with it, and with it alone.

    Symbols of frequency tables from `first_dependent` on lie on the paths of a trellis
    (`ucray.codec.trellis`) of `trellis_states`; without it all are rounded one by one. Where it is
    `interlaced`, the first group's checkerboard is coded in six passes (`ucray.codec.passes`).
    """

    wavelet: str = "haar"
    levels: tuple[Level, Level, Level] = (2, 2, 2)
    latent_stride: tuple[Step, Step, Step] = (2, 2, 2)
    code_stride: tuple[Step, Step, Step] = (4, 4, 4)
    groups: Annotated[tuple[Width, ...], msgspec.Meta(min_length=1, max_length=16)] = (2, 4, 8, 18, 32, 64)
    checkered: Annotated[int, msgspec.Meta(ge=0, le=16)] = 6
    context_width: Width = 48
    code_width: Annotated[int, msgspec.Meta(ge=0, le=4096)] = 16
    code_stages: Annotated[int, msgspec.Meta(ge=0, le=8)] = 2
    codes: Annotated[int, msgspec.Meta(ge=2, le=256)] = 64
    analysis: AnalysisConfig | None = AnalysisConfig()
    teacher: SynthesisConfig | None = SynthesisConfig(
        latent_width=96, latent_blocks=3, grid_width=32, grid_blocks=2, inr_width=8
    )
    student: SynthesisConfig | None = SynthesisConfig(
        latent_width=32, latent_blocks=1, grid_width=16, grid_blocks=1, inr_width=4
    )
    teacher_filter: FilterConfig | None = None
    student_filter: FilterConfig | None = None
    first_dependent: Annotated[int, msgspec.Meta(ge=1, le=84)] | None = None
    interlaced: bool = False
    trellis_states: TrellisStates = 8

    def __post_init__(self) -> None:
        linear = self.analysis is None
        if (self.code_stages == 0) != linear or (self.code_width == 0) != linear:
            raise ValueError("codes have stages and a width where an analysis computes them, and only there")
        if self.interlaced and not self.checkered:
            raise ValueError("what is interlaced is the first half of a checkerboard")
        if self.trellis_states != 8 and self.first_dependent is None:
            raise ValueError("trellis_states are of symbols that lie on paths: give first_dependent too")
        for cell in map(self.filter_cell, self._filters):
            if any(whole % part for whole, part in zip(self.latent_cell, cell, strict=True)):
                raise ValueError(f"a filter's cells of {cell} voxels do not fill those of {self.latent_cell}")

    @classmethod
    def parse(cls, found: object) -> CodecConfig:
        """From what JSON holds; raises msgspec.ValidationError where it holds anything else."""
        return msgspec.convert(found, cls)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold; digests are taken of it.

        Version 1 knew no post-filters, version 2 no trellis, version 3 nothing interlaced, version 4 no
        larger trellis, version 5 no cells of filters: without, they are what they were.
        """
        plain: dict[str, Any] = msgspec.to_builtins(self)
        if self.version < 6:
            for part in ("teacher_filter", "student_filter"):
                if plain[part] is not None:
                    del plain[part]["cell"]
        if self.version < 5:
            del plain["trellis_states"]
        if self.version < 4:
            del plain["interlaced"]
        if self.version < 3:
            del plain["first_dependent"]
        if self.version == 1:
            del plain["teacher_filter"], plain["student_filter"]
        return plain

    @property
    def version(self) -> int:
        """Version of the weights' format: the first that knows all of this."""
        if any(sizes.cell is not None for sizes in self._filters):
            return 6
        if self.trellis_states != 8:
            return 5
        if self.interlaced:
            return 4
        if self.first_dependent is not None:
            return 3
        return 2 if self._filters or self.teacher is None else 1

    @property
    def latents(self) -> int:
        """Latents per cell of the latent grid."""
        return sum(self.groups)

    @property
    def grid_stride(self) -> Shape3:
        """Voxels per cell of the wavelet grid."""
        return triple(2**level for level in self.levels)

    @property
    def latent_cell(self) -> Shape3:
        """Voxels per cell of the latent grid."""
        return triple(a * b for a, b in zip(self.grid_stride, self.latent_stride, strict=True))

    @property
    def stride(self) -> Shape3:
        """Voxels per codebook code; a chunk is a multiple of this on each axis."""
        return triple(a * b for a, b in zip(self.latent_cell, self.code_stride, strict=True))

    @property
    def _filters(self) -> list[FilterConfig]:
        return [sizes for sizes in (self.teacher_filter, self.student_filter) if sizes is not None]

    def filter_cell(self, sizes: FilterConfig) -> Shape3:
        """Voxels of a cell of a post-filter: its own, or two along each axis that the wavelet halves."""
        return sizes.cell or triple(2 if level else 1 for level in self.levels)

    @property
    def subbands(self) -> int:
        """Wavelet coefficients per cell of the wavelet grid."""
        return math.prod(self.grid_stride)

    @property
    def grid_kernel(self) -> Shape3:
        """Convolution kernel on the wavelet grid; 1 along an axis that the wavelet leaves alone."""
        return triple(3 if level else 1 for level in self.levels)


class DecoderSizes(msgspec.Struct, frozen=True):
    """Other sizes of the decoders than a configuration has; None leaves them as they are."""

    student: SynthesisConfig | None = None
    student_filter: FilterConfig | None = None
    teacher_filter: FilterConfig | None = None

    def given_to(self, config: CodecConfig) -> CodecConfig:
        """The configuration with these sizes; raises SettingsError where they do not fit it."""
        given = {name: sizes for name in self.__struct_fields__ if (sizes := getattr(self, name)) is not None}
        try:
            return msgspec.structs.replace(config, **given)
        except ValueError as error:
            raise SettingsError(str(error)) from None


TEACHER_FILTER, STUDENT_FILTER = FilterConfig(width=16, layers=6), FilterConfig(width=16, layers=2)
"""Post-filters of new weights."""

FIRST_DEPENDENT = 18
"""Of new weights: where a logistic's scale is a fifth of the space between symbols.

Of smaller ones nearly all are zero.
"""

LARGE_TRELLIS: TrellisStates = 256
"""Of new weights."""

SMALL_CELL = 256
"""Voxels; a latent cell of fewer has SMALL_GROUPS of latents and SMALL_NETWORKS."""

SMALL_GROUPS = (2, 4, 10, 24)

SMALL_NETWORKS = {
    "analysis": AnalysisConfig(grid_width=32, grid_blocks=1, latent_width=64, latent_blocks=2),
    "teacher": SynthesisConfig(latent_width=64, latent_blocks=3, grid_width=32, grid_blocks=1, inr_width=8),
    "student": SynthesisConfig(latent_width=32, latent_blocks=2, grid_width=16, grid_blocks=1, inr_width=4),
}
"""Networks for small cells: there are several times as many of them, and each says less."""


LARGE_NETWORKS = {
    "analysis": AnalysisConfig(grid_width=48, grid_blocks=2, latent_width=128, latent_blocks=3),
    "teacher": SynthesisConfig(latent_width=192, latent_blocks=4, grid_width=64, grid_blocks=2, inr_width=16),
}
"""Analysis and teacher that take a GPU to train; the student, which decodes, stays as it is."""


def config_for_voxels(voxel_size: tuple[float, float, float], *, large: bool = False) -> CodecConfig:
    """Choose levels and strides so that latents span about the same length on each axis.

    Parameters
    ----------
    voxel_size
        Edge lengths of a voxel (z, y, x), in any one unit. An axis whose voxels are four times as
        long gets two halvings less: 50 x 4.6 x 4.6 nm gives levels (0, 2, 2), strides (1, 2, 2).
    large
        Give analysis and teacher LARGE_NETWORKS.
    """
    finest = min(voxel_size)
    halvings = [min(3, max(0, 3 - round(math.log2(size / finest)))) for size in voxel_size]
    levels = triple(min(2, h) for h in halvings)
    strides = triple(2 ** (h - level) for h, level in zip(halvings, levels, strict=True))
    config = CodecConfig(
        levels=levels,
        latent_stride=strides,
        teacher_filter=TEACHER_FILTER,
        student_filter=STUDENT_FILTER,
        first_dependent=FIRST_DEPENDENT,
        interlaced=True,
        trellis_states=LARGE_TRELLIS,
    )
    if math.prod(config.latent_cell) < SMALL_CELL:
        config = msgspec.structs.replace(config, groups=SMALL_GROUPS, checkered=3, **SMALL_NETWORKS)
    return msgspec.structs.replace(config, **LARGE_NETWORKS) if large else config


def default_chunk(config: CodecConfig) -> Shape3:
    """A chunk shape of about 2^18 voxels that follows the voxels' anisotropy."""
    if config.stride[0] * 4 <= config.stride[1]:
        return (16, 128, 128)
    return (64, 64, 64)
