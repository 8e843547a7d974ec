"""The report of an archive: one file that needs no other, with the figures of the archive, in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from browser import Browser, chromium
from PIL import Image
from typer.testing import CliRunner

import ucray
from ucray.cli import app
from ucray.errors import ArchiveError, DestinationError, SettingsError
from ucray.report import WORST, survey_of, write_report
from ucray.storage.archive import WEIGHTS_KEY, open_archive
from ucray.storage.volume import open_volume

SHAPE = (48, 64, 80)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Path:
    """A volume whose one corner is fill, another a constant, a third noise; and its archive."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    array = zarr.create_array(folder / "em.zarr", shape=SHAPE, chunks=SHAPE, dtype="uint8", fill_value=0)
    voxels = np.random.default_rng(0).integers(120, 130, SHAPE, dtype=np.uint8)
    voxels[:16, :32, :32] = 0
    voxels[32:, 32:, 48:] = np.random.default_rng(1).integers(1, 255, (16, 32, 32), dtype=np.uint8)
    array[...] = voxels
    ucray.compress(
        str(folder / "em.zarr"),
        str(folder / "em<i>.ucray"),
        ucray.CompressOptions(psnr=24, chunk=(16, 16, 16), shard=(32, 32, 32)),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return folder


@pytest.fixture(scope="session")
def page(folder: Path) -> str:
    place = folder / "report.html"
    done = CliRunner().invoke(
        app, ["report", str(folder / "em<i>.ucray"), "--source", str(folder / "em.zarr"), "-o", str(place)]
    )
    assert done.exit_code == 0, done.output
    return place.read_text()


def test_the_figures_are_those_of_the_archive(folder: Path, page: str) -> None:
    found = ucray.info(str(folder / "em<i>.ucray"))
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    assert rows["PSNR"] == f"{found['psnr']:.2f} dB"
    assert rows["ratio"] == f"{found['measured_ratio']:.2f}"
    assert rows["shards"] == "12 of 12"
    assert "4 empty" in rows["chunks"]
    assert rows["chunk"] == "16x16x16"
    assert rows["weights digest"] == found["weights_digest"]
    assert rows["source"].endswith("em.zarr")
    assert f"ucray {ucray.__version__}, torch " in rows["versions"]
    assert "command" in rows


def test_weights_that_are_kept_beside_the_shards_are_no_bytes_of_the_volume(
    folder: Path, page: str, tmp_path: Path
) -> None:
    shutil.copytree(folder / "em<i>.ucray", tmp_path / "a")
    (tmp_path / "a" / WEIGHTS_KEY).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "tiny.safetensors", tmp_path / "a" / WEIGHTS_KEY)
    done = CliRunner().invoke(app, ["report", str(tmp_path / "a"), "-o", str(tmp_path / "r.html")])
    assert done.exit_code == 0, done.output
    before, after = (
        dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
        for text in (page, (tmp_path / "r.html").read_text())
    )
    assert after["ratio"] == before["ratio"]
    assert after["stored"].split(" and ")[0] == before["stored"].split(" and ")[0]
    assert after["stored"] != before["stored"]


def test_the_page_needs_no_other_file(page: str) -> None:
    places: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "i")
            places.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Links().feed(page)
    assert len(places) > WORST
    assert all(place.startswith("data:") for place in places)


def test_the_survey_adds_up(folder: Path) -> None:
    archive = open_archive(str(folder / "em<i>.ucray"))
    survey = survey_of(archive)
    statistics = list(archive.all_statistics())
    assert survey.bits.sum() == 8 * sum(chunk.bytes for shard in statistics for chunk in shard.chunks)
    assert survey.voxels.sum() == np.prod(SHAPE)
    assert survey.bits.shape == (3, 4, 5)
    # Nothing is stored of fill.
    assert (survey.bits[0, :2, :2] == 0).all()
    assert (survey.bits > 0).sum() == 60 - 4
    # The noise is what is worst.
    four = sorted(start for _, start, _ in sorted(survey.worst)[-4:])
    assert four == [(32, y, x) for y in (32, 48) for x in (48, 64)]
    assert len(survey.worst) == WORST


def test_a_volume_of_many_chunks_has_cells_of_several(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucray.report.LARGEST_MAP", 2)
    survey = survey_of(open_archive(str(folder / "em<i>.ucray")))
    assert survey.cell == (32, 32, 48)
    assert survey.bits.shape == (2, 2, 2)
    assert survey.voxels.sum() == np.prod(SHAPE)


def test_worst_chunks_are_shown_as_they_are(folder: Path, page: str) -> None:
    corner = re.search(r'<section class="worst"><h3>\((\d+), (\d+), (\d+)\)</h3>.*?</section>', page)
    assert corner is not None
    z, y, x = (int(n) for n in corner.groups())
    found = re.findall(r'alt="(\w+)" src="data:image/png;base64,([^"]+)"', corner[0])
    assert [name for name, _ in found] == ["original", "decoded", "error"]
    archive: Any = zarr.open_group(folder / "em<i>.ucray", mode="r")["0"]
    source: Any = zarr.open_array(folder / "em.zarr", mode="r")
    for (_, data), array in zip(found[:2], (source, archive), strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0]
        plane = array[z, y : y + 16, x : x + 16]
        assert shown.shape == plane.shape
        # Stretched and clipped, but in the same order.
        assert np.corrcoef(shown.ravel(), plane.ravel())[0, 1] > 0.99


def test_a_report_is_written_once_and_for_an_archive_alone(folder: Path, page: str, tmp_path: Path) -> None:
    archive = str(folder / "em<i>.ucray")
    with pytest.raises(DestinationError, match="exists"):
        write_report(archive, str(folder / "report.html"))
    with pytest.raises(DestinationError, match="cannot be written"):
        write_report(archive, str(tmp_path / "none" / "report.html"))
    with pytest.raises(ArchiveError):
        write_report(str(tmp_path / "none.ucray"), str(tmp_path / "r.html"))
    zarr.create_array(tmp_path / "other.zarr", shape=SHAPE, chunks=SHAPE, dtype="uint16")
    with pytest.raises(SettingsError, match="uint16"):
        write_report(archive, str(tmp_path / "r.html"), open_volume(str(tmp_path / "other.zarr")))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine; apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_light_dark_and_narrow(
    folder: Path, page: str, tmp_path: Path, scheme: str
) -> None:
    with Browser(tmp_path, size=(360, 700)) as browser:
        browser.emulate(scheme)
        browser.open((folder / "report.html").as_uri())
        picture = browser.picture()
        # The ground follows the scheme, and nothing runs out of a narrow window.
        assert (picture[5, 5].mean() > 200) == (scheme == "light")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        assert browser.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert browser.problems == []
