"""How far a decoded volume is from its source: squared error, PSNR, SSIM."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ErrorSum:
    """Squared and maximal error over a number of voxels; adds up over chunks and shards.

    `squared` is in squared units of the voxel values, `maximum` in units of the voxel values.
    """

    voxels: int = 0
    squared: float = 0.0
    maximum: float = 0.0

    @classmethod
    def between(cls, original: npt.NDArray[np.generic], decoded: npt.NDArray[np.generic]) -> ErrorSum:
        """Measure `decoded` against `original`, two arrays of one shape; not-a-number equals itself."""
        both = np.promote_types(original.dtype, decoded.dtype)
        # Short whole numbers are exact in either; these are half the work.
        short = both.kind in "iu" and both.itemsize <= 2
        # Infinity less itself is not a number; it is set right below.
        with np.errstate(invalid="ignore"):
            difference = np.subtract(original, decoded, dtype=np.int32 if short else np.float64)
        if both.kind == "f":
            both_nan = np.isnan(original.astype(np.float64)) & np.isnan(decoded.astype(np.float64))
            difference[both_nan | (original == decoded)] = 0.0
        flat = difference.astype(np.float64, copy=False).reshape(-1)
        return cls(
            voxels=int(difference.size),
            # What is not whole comes to the same sum in however many threads.
            squared=float(np.vdot(flat, flat) if short else np.einsum("i,i->", flat, flat)),
            maximum=float(max(difference.max(initial=0), -difference.min(initial=0))),
        )

    def __add__(self, other: ErrorSum) -> ErrorSum:
        return ErrorSum(
            self.voxels + other.voxels, self.squared + other.squared, max(self.maximum, other.maximum)
        )

    @property
    def mse(self) -> float:
        """Mean squared error; zero where there are no voxels."""
        return self.squared / self.voxels if self.voxels else 0.0

    def psnr(self, data_range: float) -> float:
        """Peak signal-to-noise ratio in dB at `data_range`; infinite where there is no error."""
        return psnr_of(self.mse, data_range)


@dataclass(frozen=True)
class SeamSum:
    """Whether the faces of chunks show: errors beside them, and steps of the error across them.

    `beside` are voxels next to a face between two chunks, `inside` all others. `across` are pairs of
    neighbours with such a face between them, `within` pairs of one chunk; what is summed is the difference of
    their errors. Adds up over parts of a volume.
    """

    beside: ErrorSum = ErrorSum()
    inside: ErrorSum = ErrorSum()
    across: ErrorSum = ErrorSum()
    within: ErrorSum = ErrorSum()

    @classmethod
    def between(
        cls,
        original: npt.NDArray[np.generic],
        decoded: npt.NDArray[np.generic],
        chunk: tuple[int, int, int],
    ) -> SeamSum:
        """Measure arrays (z, y, x) of one shape that begin with a chunk; not-a-number has no error.

        Goes chunk by chunk, with the first voxels of the next ones: no more memory is taken than for these.
        """
        total = cls()
        counts = [range(0, n, c) for n, c in zip(original.shape, chunk, strict=True)]
        for start in itertools.product(*counts):
            stops = [min(at + size, n) for at, size, n in zip(start, chunk, original.shape, strict=True)]
            place = tuple(
                slice(at, min(stop + 1, n)) for at, stop, n in zip(start, stops, original.shape, strict=True)
            )
            with np.errstate(invalid="ignore"):
                error = decoded[place].astype(np.float64) - original[place].astype(np.float64)
            np.nan_to_num(error, copy=False, posinf=0.0, neginf=0.0)
            total += cls._of_chunk(error, start, [stop - at for at, stop in zip(start, stops, strict=True)])
        return total

    @classmethod
    def _of_chunk(cls, error: npt.NDArray[np.float64], start: tuple[int, ...], extent: list[int]) -> SeamSum:
        """Of the errors of a chunk of `extent` that starts there, and of the next voxels if there are any."""
        own = tuple(slice(0, n) for n in extent)
        near = np.zeros(extent, bool)
        across, within = ErrorSum(), ErrorSum()
        for axis, size in enumerate(extent):
            others = tuple(slice(None) if a == axis else part for a, part in enumerate(own))
            step = np.moveaxis(np.diff(error[others], axis=axis), axis, 0)
            within += _squares(step[: size - 1])
            across += _squares(step[size - 1 :])
            planes = np.moveaxis(near, axis, 0)
            if start[axis] > 0:
                planes[0] = True
            if error.shape[axis] > size:
                planes[-1] = True
        return cls(_squares(error[own][near]), _squares(error[own][~near]), across, within)

    def __add__(self, other: SeamSum) -> SeamSum:
        return SeamSum(
            self.beside + other.beside,
            self.inside + other.inside,
            self.across + other.across,
            self.within + other.within,
        )

    @property
    def error(self) -> float:
        """Root mean squared error beside faces over that inside; 1 where there are no faces or no errors."""
        return _root_ratio(self.beside, self.inside)

    @property
    def step(self) -> float:
        """Root mean squared step of the error across faces over that within; 1 where there are none."""
        return _root_ratio(self.across, self.within)


def _squares(values: npt.NDArray[np.float64]) -> ErrorSum:
    return ErrorSum(values.size, float(np.square(values).sum()), float(np.abs(values).max(initial=0.0)))


def _root_ratio(found: ErrorSum, against: ErrorSum) -> float:
    if against.mse > 0.0:
        return math.sqrt(found.mse / against.mse) if found.voxels else 1.0
    return math.inf if found.mse > 0.0 else 1.0


def psnr_of(mse: float, data_range: float) -> float:
    """PSNR in dB of a mean squared error at `data_range`; infinite for an error of zero."""
    if mse <= 0.0:
        return math.inf
    return 10.0 * math.log10(data_range * data_range / mse)


def ssim(original: npt.NDArray[np.generic], decoded: npt.NDArray[np.generic], data_range: float) -> float:
    """Structural similarity (Wang et al. 2004), mean over the slices along z.

    Parameters
    ----------
    original, decoded
        Arrays (z, y, x) of one shape, at least 7 x 7 in (y, x).
    data_range
        Span of the voxel values that counts as the peak.
    """
    from skimage.metrics import structural_similarity

    return float(
        np.mean(
            [
                structural_similarity(  # type: ignore[no-untyped-call]
                    first.astype(np.float32), second.astype(np.float32), data_range=data_range
                )
                for first, second in zip(original, decoded, strict=True)
            ]
        )
    )
