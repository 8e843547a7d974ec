"""What a plan promises of a job: the job keeps it, and the cheapest way to keep a volume is recommended."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st
from object_store import ObjectStore
from test_resume import counted

import ucray
from ucray.cli import main
from ucray.cluster.cost import Prices, Way, break_even, cheapest, way
from ucray.cluster.projection import BLOSC, JPEG_XL, OURS, project
from ucray.errors import DestinationError
from ucray.storage.objects import open_objects

OPTIONS = ucray.CompressOptions(ratio=16, chunk=(32, 32, 32), shard=(32, 64, 64))
SERIAL = ucray.RunOptions(serial=True)

amounts = st.floats(0.0, 1e6)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(tiny_weights.to_bytes())
    return str(path)


def test_a_way_costs_what_its_bytes_hours_and_requests_do() -> None:
    prices = Prices(gb_month=0.02, thousand_puts=5.0, thousand_gets=0.5)
    found = way("ucray", 3e9, 31.0, prices, compute=7.0, puts=2000, gets=4000)
    assert found == Way("ucray", 3_000_000_000, 31.0, 7.0 + 10.0 + 2.0, 0.06)
    assert found.total(10.0) == pytest.approx(19.6)


@given(amounts, amounts, amounts, amounts)
def test_at_break_even_both_ways_have_cost_the_same(once: float, monthly: float, o: float, m: float) -> None:
    chosen, other = Way("a", 1, 0.0, once, monthly), Way("b", 1, 0.0, o, m)
    months = break_even(chosen, other)
    if months is None:
        # However long: a difference of one place in a price takes long to add up.
        assert chosen.monthly >= other.monthly
    elif months == 0.0:
        assert chosen.total(0.0) <= other.total(0.0)
        assert chosen.total(1e12) <= other.total(1e12)
    else:
        assume(months < 1e12)
        assert chosen.total(months) == pytest.approx(other.total(months), rel=1e-6)


def test_the_cheapest_way_depends_on_how_long_it_is_kept() -> None:
    ways = [Way("keep", 1, math.inf, 0.0, 10.0), Way("code", 1, 30.0, 50.0, 1.0)]
    assert cheapest(ways, 5.0).name == "keep"
    assert cheapest(ways, 6.0).name == "code"


@pytest.mark.parametrize("shards", [None, (64, 64, 64)], ids=["plain source", "sharded source"])
def test_the_job_keeps_what_the_plan_says(
    shards: tuple[int, int, int] | None,
    store: ObjectStore,
    bucket: str,
    weights_file: str,
) -> None:
    name = "plain" if shards is None else "sharded"
    source, archive = f"{bucket}/{name}.zarr", f"{bucket}/{name}.ucray"
    connection = ucray.Connection(store.endpoint)
    ucray.synth(f"{bucket}/{name}-drawn.zarr", (64, 96, 96), seed=2, connection=connection)
    drawn = zarr.open_array(f"{bucket}/{name}-drawn.zarr/0", mode="r")
    zarr.create_array(
        source,
        data=np.asarray(drawn[...]),
        chunks=(32, 32, 64),
        shards=shards,
        # Where an array says nothing of its voxels' size, it is looked for around it.
        attributes={"resolution": [8, 8, 8]},
        storage_options={"endpoint_url": store.endpoint},
    )

    before = open_objects(bucket, store.endpoint).sizes("")
    projection = project(source, archive, OPTIONS, weights=weights_file, connection=connection)
    assert open_objects(bucket, store.endpoint).sizes("") == before
    planned = projection.describe()
    with counted() as requests:
        report = ucray.compress(
            source, archive, OPTIONS, weights=weights_file, run_options=SERIAL, connection=connection
        )
    # What a job is held to by its rate control holds for the plan.
    assert planned["projected_ratio"] == pytest.approx(report.ratio, rel=0.03)
    assert planned["projected_psnr"] == pytest.approx(report.psnr, abs=0.05)
    assert requests["put_object"] == planned["puts"]
    assert requests["get_object"] == planned["gets"]

    done = project(source, archive, OPTIONS, weights=weights_file, connection=connection).describe()
    assert (done["shards_present"], done["hours"], done["puts"]) == (planned["shards"], 0.0, 2)
    with pytest.raises(DestinationError, match="other settings"):
        project(source, archive, ucray.CompressOptions(ratio=8), weights=weights_file, connection=connection)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("volume") / "em.zarr")
    ucray.synth(path, (64, 64, 64), seed=3)
    return path


def test_what_costs_nothing_to_keep_is_kept(volume: str, weights_file: str, tmp_path: Path) -> None:
    free = Prices(gb_month=0.0)
    found = project(volume, str(tmp_path / "a"), OPTIONS, weights=weights_file, prices=free).describe()
    assert found["recommended"] == BLOSC
    assert found["break_even_months"][BLOSC] is None
    dear = Prices(gb_month=1e3, core_hour=0.0, thousand_puts=0.0, thousand_gets=0.0)
    found = project(volume, str(tmp_path / "a"), OPTIONS, weights=weights_file, prices=dear).describe()
    smallest = min(found["ways"], key=lambda name: found["ways"][name]["bytes"])
    assert found["recommended"] == smallest
    assert found["ways"][JPEG_XL]["psnr"] >= found["ways"][OURS]["psnr"]


def test_where_a_bound_holds_the_others_lose_nothing_either(
    volume: str, weights_file: str, tmp_path: Path
) -> None:
    bounded = OPTIONS.model_copy(update={"ratio": None, "max_error": 2.0})
    ways = project(volume, str(tmp_path / "a"), bounded, weights=weights_file).ways()
    assert math.isinf(ways[JPEG_XL].psnr)
    assert math.isfinite(ways[OURS].psnr)


def test_workers_share_the_hours_and_not_the_work(volume: str, weights_file: str, tmp_path: Path) -> None:
    eight = ucray.RunOptions(encode_workers=8)
    found = project(volume, str(tmp_path / "a"), OPTIONS, weights=weights_file, run_options=eight).describe()
    # A worker without a shard would share no hours.
    assert found["workers"] == min(8, found["shards"])
    assert found["core_hours"] == pytest.approx(found["workers"] * found["hours"])
    assert found["gpu_hours"] is None


def test_without_weights_a_plan_says_what_comes_first(tmp_path: Path) -> None:
    source = str(tmp_path / "slices.zarr")
    ucray.synth(source, (32, 32, 32))
    group = zarr.open_group(source, mode="r+")
    ome: Any = group.attrs["ome"]
    (scale,) = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    scale["scale"] = [50.0, 4.0, 4.0]
    group.attrs["ome"] = ome
    found = project(source, str(tmp_path / "a")).describe()
    assert "weights are trained first" in found["pilot"]
    assert "hours" not in found


@pytest.mark.parametrize("command", [("plan",), ("compress", "--dry-run")])
def test_the_command_prints_the_plan_and_writes_nothing(
    command: tuple[str, ...],
    volume: str,
    weights_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    archive = tmp_path / "em.ucray"
    arguments = [
        *command,
        volume,
        str(archive),
        "--weights",
        weights_file,
        "--chunk",
        "32,32,32",
        "--ratio",
        "16",
    ]
    monkeypatch.setattr(sys, "argv", ["ucray", *arguments])
    with pytest.raises(SystemExit, match="0"):
        main()
    printed = capsys.readouterr().out
    assert "keep as" in printed
    assert "blosc-zstd" in printed
    monkeypatch.setattr(sys, "argv", ["ucray", *arguments, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert json.loads(capsys.readouterr().out)["ways"].keys() == {OURS, BLOSC, JPEG_XL}
    assert not archive.exists()
