"""The command line: what people type, what they read, and how bad input ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from object_store import ObjectStore

import ucray
from ucray.cli import main


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> str:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(tiny_weights.to_bytes())
    return str(path)


@pytest.fixture
def volume(tmp_path: Path) -> str:
    path = str(tmp_path / "em.zarr")
    ucray.synth(path, (32, 48, 48))
    return path


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["ucray", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_a_volume_goes_the_whole_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, weights_file: str
) -> None:
    source, archive, plain = (str(tmp_path / name) for name in ("em.zarr", "em.ucray", "plain.zarr"))
    assert _run(monkeypatch, "synth", source, "--shape", "32,48,48", "--json") == 0
    assert _json(capsys)["shape"] == [32, 48, 48]
    compress = ("compress", source, archive, "--weights", weights_file, "--chunk", "32,16,16", "--ratio", "8")
    assert _run(monkeypatch, *compress, "--dry-run", "--json") == 0
    planned = _json(capsys)
    assert not Path(archive).exists()
    assert _run(monkeypatch, *compress, "--serial", "--json") == 0
    done = _json(capsys)
    assert done["shards"] == planned["shards"]
    assert _run(monkeypatch, "verify", archive, "--source", source, "--serial", "--json") == 0
    assert _json(capsys)["clean"] is True
    assert _run(monkeypatch, "info", archive, "--json") == 0
    assert _json(capsys)["bytes_out"] == done["bytes_out"]
    assert _run(monkeypatch, "decompress", archive, plain, "--serial", "--json") == 0
    decoded = zarr.open_group(plain, mode="r")["0"]
    expected = zarr.open_group(archive, mode="r")["0"]
    np.testing.assert_array_equal(decoded[...], expected[...])  # type: ignore[index]


def test_people_get_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], volume: str
) -> None:
    assert _run(monkeypatch, "compress", volume, "unused", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "chunks" in printed
    assert "32, 48, 48" in printed


def test_a_damaged_archive_ends_verify_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, volume: str, weights_file: str
) -> None:
    archive = tmp_path / "em.ucray"
    assert (
        _run(
            monkeypatch,
            "compress",
            volume,
            str(archive),
            "--weights",
            weights_file,
            "--chunk",
            "32,16,16",
            "--serial",
        )
        == 0
    )
    (archive / "0" / "c" / "0" / "0" / "0").unlink()
    assert _run(monkeypatch, "verify", str(archive), "--serial") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SRC/none", "DST", "--weights", "W"], "SourceError: .*does not exist"),
        (["FLAT", "DST", "--weights", "W"], "SourceError: .*2 axes"),
        (["DOUBLE", "DST", "--weights", "W"], "DtypeError: .*float64"),
        (["GROUP", "DST", "--weights", "W"], "SourceError: .*--array"),
        (["SRC", "DST", "--weights", "W", "--chunk", "20,16,16"], "SettingsError: .*multiple of 16,16,16"),
        (["SRC", "DST", "--weights", "W", "--chunk", "big"], "SettingsError: .*form 64,64,64"),
        (["SRC", "DST", "--weights", "W", "--ratio", "0.5"], "SettingsError: --ratio 0.5"),
        (["SRC", "DST", "--weights", "W", "--roi", "3:3,:,:"], "SettingsError: .*empty"),
        (["SRC", "DST", "--weights", "none.safetensors"], "WeightsError: there are no weights"),
        (["SRC", "DST", "--weights", "CUT"], "WeightsError: .*damaged"),
        (["SRC", "http://127.0.0.1/x", "--weights", "W"], "SettingsError: .*cannot be written to"),
        (["SRC", "OTHER", "--weights", "W"], "DestinationError: .*not empty"),
        (["SRC", "DST", "--weights", "W", "--device", "tpu"], "SettingsError: --device tpu"),
        (["SRC", "DST", "--weights", "W", "--shard", "9999,9999,9999"], "SettingsError: "),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: str,
    weights_file: str,
    arguments: list[str],
    message: str,
) -> None:
    zarr.create_array(tmp_path / "flat.zarr", shape=(4, 4), dtype="uint8", chunks=(4, 4))
    zarr.create_array(tmp_path / "double.zarr", shape=(4, 4, 4), dtype="float64", chunks=(4, 4, 4))
    zarr.create_group(tmp_path / "group.zarr")
    (tmp_path / "cut").write_bytes(Path(weights_file).read_bytes()[:-5])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    places = {
        "SRC": volume,
        "SRC/none": volume + "/none",
        "FLAT": str(tmp_path / "flat.zarr"),
        "DOUBLE": str(tmp_path / "double.zarr"),
        "GROUP": str(tmp_path / "group.zarr"),
        "DST": str(tmp_path / "em.ucray"),
        "OTHER": str(tmp_path / "other"),
        "W": weights_file,
        "CUT": str(tmp_path / "cut"),
    }
    before = sorted(path for path in tmp_path.rglob("*"))
    status = _run(monkeypatch, "compress", "--serial", *(places.get(word, word) for word in arguments))
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_large_networks_are_refused_where_others_are_to_start_from(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: str,
    weights_file: str,
) -> None:
    destination = tmp_path / "new.safetensors"
    assert _run(monkeypatch, "train", volume, str(destination), "--large", "--init", weights_file) == 2
    assert "SettingsError: --large sizes new networks" in capsys.readouterr().err
    assert not destination.exists()


def test_a_job_that_leaves_shards_out_says_so_by_its_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: str,
    weights_file: str,
) -> None:
    nothing = tmp_path / "boxes.json"
    nothing.write_text("[]")
    command = ["compress", volume, str(tmp_path / "a"), "--weights", weights_file, "--chunk", "32,16,16"]
    assert _run(monkeypatch, *command, "--serial", "--json", "--boxes", str(nothing)) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["left"], report["bytes_in"]) == (report["shards"], 0)
    assert _run(monkeypatch, *command, "--serial", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left"] == 0


def test_a_budget_of_memory_is_read_and_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, volume: str
) -> None:
    plan = ["compress", volume, str(tmp_path / "a"), "--dry-run", "--shard", "512,512,512"]
    assert _run(monkeypatch, *plan, "--memory", "2GiB") == 0
    capsys.readouterr()
    assert _run(monkeypatch, *plan, "--memory", "1.8GiB") == 2
    error = capsys.readouterr().err
    assert "over the budget of 1.8 GiB; the largest that fits is 448,448,448" in error
    assert _run(monkeypatch, *plan, "--memory", "plenty") == 2
    assert "SettingsError: --memory plenty" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["64,2,32,1", "64,2,32,1,4,4", "64,2,32,-1,4", "0,2,32,1,4", "wide"])
def test_a_student_of_no_size_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: str,
    size: str,
) -> None:
    destination = tmp_path / "new.safetensors"
    assert _run(monkeypatch, "train", volume, str(destination), "--student", size) == 2
    error = capsys.readouterr().err
    assert f"SettingsError: '{size}' does not size a synthesis network" in error
    assert error.count("\n") == 1
    assert not destination.exists()


def test_an_archive_with_weights_of_another_digest_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    volume: str,
    weights_file: str,
) -> None:
    archive = tmp_path / "em.ucray"
    ucray.compress(
        volume,
        str(archive),
        ucray.CompressOptions(chunk=(32, 16, 16)),
        weights=weights_file,
        run_options=ucray.RunOptions(serial=True),
    )
    metadata = archive / "0" / "zarr.json"
    digest = ucray.load_weights(weights_file).decoder().digest
    metadata.write_text(metadata.read_text().replace(digest, "0" * 64))
    assert _run(monkeypatch, "verify", str(archive), "--serial") == 2
    assert "WeightsError: the weights in zarr.json have digest" in capsys.readouterr().err


def test_no_bucket_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    store: ObjectStore,
    volume: str,
    weights_file: str,
) -> None:
    compress = ("compress", volume, "s3://nobody/em.ucray", "--weights", weights_file, "--serial")
    assert _run(monkeypatch, *compress, "--endpoint-url", store.endpoint) == 2
    assert "StorageError: bucket nobody does not exist" in capsys.readouterr().err


def test_no_credentials_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    no_credentials: str,
    volume: str,
    weights_file: str,
) -> None:
    compress = ("compress", volume, "s3://ucray-tests/em.ucray", "--weights", weights_file, "--serial")
    assert _run(monkeypatch, *compress, "--endpoint-url", no_credentials) == 2
    assert "CredentialsError: no credentials" in capsys.readouterr().err


def test_the_installed_command_ends_without_a_traceback(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("ucray")
    ended = subprocess.run(
        [command, "info", str(tmp_path / "none")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("ArchiveError: ")


def test_a_failed_job_exits_with_1() -> None:
    assert ucray.UcrayError.exit_status == 2
    from ucray.errors import JobError

    assert JobError.exit_status == 1
