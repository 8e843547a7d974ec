from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ucray import synthetic
from ucray.errors import SettingsError
from ucray.grid import Shape3
from ucray.synthetic import synthetic_volume

Volume = npt.NDArray[np.uint8]
SHAPES: list[Shape3] = [
    (48, 64, 80),
    (7, 150, 40),
    (90, 16, 16),
    (3, 3, 3),
    (1, 60, 60),
    (2, 1, 9),
    (1, 1, 1),
]


def occupied(tissue: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last voxel of tissue on each axis."""
    return [(int(places.min()), int(places.max())) for places in np.nonzero(tissue)]


@pytest.fixture(scope="module")
def volume() -> Volume:
    return synthetic_volume((128, 136, 144), seed=5)


def test_a_seed_gives_the_same_voxels_again_and_another_seed_others() -> None:
    first = synthetic_volume((40, 50, 60), seed=3)
    assert np.array_equal(first, synthetic_volume((40, 50, 60), seed=3))
    other = synthetic_volume((40, 50, 60), seed=4)
    both = (first > 0) & (other > 0)
    # Correlation sees other cells, not just other noise.
    assert abs(np.corrcoef(first[both], other[both])[0, 1]) < 0.3


@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_is_drawn_and_holds_tissue(shape: Shape3) -> None:
    drawn = synthetic_volume(shape)
    assert drawn.shape == shape
    assert drawn.dtype == np.uint8
    assert drawn.any()


def test_zeros_are_the_border_and_the_border_is_zeros(volume: Volume) -> None:
    tissue = volume > 0
    # Lines along y and x hold one unbroken run of tissue: every zero reaches the outside on its line.
    for axis in (1, 2):
        assert np.abs(np.diff(tissue.astype(np.int8), axis=axis)).sum(axis).max() == 2
    assert occupied(tissue) == [(6, 121), (7, 128), (7, 136)]


def test_the_border_is_tilted_on_one_side_and_stepped_on_another(volume: Volume) -> None:
    tissue = volume[6:122] > 0
    first_x = tissue[0, 7:120].argmax(axis=1)
    assert np.all(np.diff(first_x) >= 0)
    assert first_x[-1] - first_x[0] > 3
    last_y = tissue.shape[1] - 1 - tissue[:, ::-1, 100].argmax(axis=1)
    steps = np.flatnonzero(np.diff(last_y))
    assert 1 <= len(steps) < 12


def test_padding_is_what_was_asked_for() -> None:
    padded = synthetic_volume((30, 40, 50), padding=4) > 0
    z, y, x = occupied(padded)
    assert (z, y[0], x) == ((4, 25), 4, (4, 45))
    # The stepped face is up to as much again further in.
    assert 31 <= y[1] <= 35
    assert synthetic_volume((30, 40, 50), padding=0).all()


@pytest.mark.parametrize("seed", range(4))
def test_tissue_has_the_greys_that_the_docstring_states(seed: int) -> None:
    drawn = synthetic_volume((128, 128, 128), seed)
    tissue = drawn[drawn > 0].astype(np.float64)
    assert 125 <= tissue.mean() <= 150
    assert 30 <= tissue.std() <= 42


def test_the_noise_has_the_standard_deviation_that_the_docstring_states(volume: Volume) -> None:
    core = volume[16:112, 16:112, 16:112].astype(np.float64)
    # Diagonal second differences leave white noise alone and nearly nothing of smooth structure.
    residue = core[:, :-1, :-1] - core[:, 1:, :-1] - core[:, :-1, 1:] + core[:, 1:, 1:]
    assert np.median(np.abs(residue)) / 0.6745 / 2.0 == pytest.approx(9.0, rel=0.1)


def test_structure_is_smooth_and_has_dark_and_bright_parts(volume: Volume) -> None:
    core = volume[16:112, 16:112, 16:112].astype(np.float64)
    for axis in range(3):
        line = np.moveaxis(core, axis, 0)
        near = np.corrcoef(line[:-2].ravel(), line[2:].ravel())[0, 1]
        far = np.corrcoef(line[:-60].ravel(), line[60:].ravel())[0, 1]
        assert near > 0.7
        assert abs(far) < 0.35
    blocks = core.reshape(24, 4, 24, 4, 24, 4).mean(axis=(1, 3, 5))
    # Membranes and mitochondria against cytoplasm.
    assert np.quantile(blocks, 0.05) < 110
    assert np.quantile(blocks, 0.95) > 170


def test_the_size_of_a_slab_leaves_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = synthetic_volume((40, 48, 48), seed=2)
    monkeypatch.setattr(synthetic, "SLAB_VOXELS", 5 * 48 * 48)
    slabs = synthetic_volume((40, 48, 48), seed=2)
    # Matrix products of another size may round a grey the other way.
    assert np.abs(whole.astype(int) - slabs).max() <= 1
    assert np.mean(whole != slabs) < 0.001


@pytest.mark.parametrize(
    ("shape", "seed", "padding"),
    [((0, 8, 8), 0, None), ((8, 8, 8), -1, None), ((8, 8, 8), 0, 4), ((8, 8, 8), 0, -1)],
)
def test_what_leaves_no_tissue_is_refused(shape: Shape3, seed: int, padding: int | None) -> None:
    with pytest.raises(SettingsError):
        synthetic_volume(shape, seed, padding=padding)
