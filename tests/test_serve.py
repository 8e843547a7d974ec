"""The gateway over real HTTP: what zarr, tensorstore and a browser get from it, and what it refuses."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorstore
import uvicorn
import zarr
from browser import Browser, chromium, wait_for
from numpy.lib.stride_tricks import sliding_window_view
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

import ucray
from ucray.errors import ArchiveError, SettingsError
from ucray.serve.cache import BusyError, ChunkCache, Payload
from ucray.serve.gateway import Limits, gateway
from ucray.serve.scales import Image
from ucray.serve.start import application
from ucray.storage.space import Space
from ucray.storage.volume import open_volume

COMMAND = str(Path(sys.executable).with_name("ucray"))
SHAPE = (40, 100, 120)
REGION = (slice(0, 40), slice(10, 100), slice(0, 120))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_weights: ucray.Weights) -> Path:
    """A volume em.zarr, and em.ucray of a region of it."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "tiny.safetensors").write_bytes(tiny_weights.to_bytes())
    space = Space((8.0, 8.0, 8.0), (800.0, 80.0, 0.0), "nanometer")
    array = zarr.create_group(folder / "em.zarr", attributes=space.to_ome("em")).create_array(
        "0", shape=SHAPE, chunks=SHAPE, dtype="uint8", fill_value=0
    )
    z, y, x = np.indices(SHAPE)
    array[...] = (100 + 50 * np.sin(y / 9) * np.cos(x / 13) + z).astype(np.uint8)
    ucray.compress(
        str(folder / "em.zarr"),
        str(folder / "em.ucray"),
        ucray.CompressOptions(
            psnr=25, chunk=(16, 32, 32), shard=(32, 64, 64), roi="0:40,10:100,0:120", levels=2
        ),
        weights=str(folder / "tiny.safetensors"),
        run_options=ucray.RunOptions(serial=True),
    )
    return folder


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL of an application that a real server runs."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            wait_for(lambda: server.started, 30)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="session")
def url(folder: Path) -> Iterator[str]:
    volume = open_volume(str(folder / "em.zarr"))
    with served(application(str(folder / "em.ucray"), volume, Limits(), None)) as url:
        yield url


@pytest.fixture(scope="session")
def decoded(folder: Path) -> dict[str, Any]:
    group: Any = zarr.open_group(folder / "em.ucray", mode="r")
    return {level: group[level][...] for level in ("0", "1", "2")}


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_any_zarr_reader_gets_what_the_archive_decodes_to(
    url: str, decoded: dict[str, Any], level: str
) -> None:
    group: Any = zarr.open_group(f"{url}/compressed/zarr", mode="r")
    np.testing.assert_array_equal(group[level][...], decoded[level])
    # Plain codecs: nothing that wants ucray at the reader.
    assert {codec["name"] for codec in group[level].metadata.to_dict()["codecs"]} == {"bytes", "gzip"}


@pytest.mark.parametrize("level", ["0", "1", "2"])
def test_precomputed_is_the_same(url: str, decoded: dict[str, Any], level: str) -> None:
    volume = open_volume(f"precomputed://{url}/compressed/precomputed", level)
    assert volume.space.scale == tuple(8.0 * 2 ** int(level) for _ in range(3))
    whole = decoded[level]
    found = volume.array.voxels[(slice(None), slice(None), slice(None), 0)].transpose(2, 1, 0)
    np.testing.assert_array_equal(found, whole)


def test_precomputed_stands_where_the_source_does(url: str) -> None:
    spec = {"driver": "neuroglancer_precomputed", "kvstore": f"{url}/compressed/precomputed/"}
    store = tensorstore.open(spec, open=True, read=True).result()
    # (z, y, x) begins at voxel (100, 10, 0), and the region 10 rows further.
    assert list(store.domain.inclusive_min) == [0, 20, 100, 0]


def test_the_source_stands_beside_it_in_the_same_region(url: str, folder: Path) -> None:
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    group: Any = zarr.open_group(f"{url}/original/zarr", mode="r")
    np.testing.assert_array_equal(group["0"][...], original[REGION])
    assert group.attrs["ome"] is not None
    compressed = zarr.open_group(f"{url}/compressed/zarr", mode="r").attrs.asdict()["ome"]
    datasets = [found["multiscales"][0]["datasets"] for found in (group.attrs.asdict()["ome"], compressed)]  # type: ignore[index,call-overload]
    assert datasets[0] == datasets[1]


CHUNK = "compressed/zarr/0/c/0/0/0"


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=-999999999", 206, slice(None)),
        ("bytes=3-999999999", 206, slice(3, None)),
        ("bytes=999999999-", 416, None),
        ("bytes=9-3", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=0-1,4-5", 416, None),
        ("bytes=a-b", 416, None),
        ("lines=0-9", 416, None),
        ("bytes=", 416, None),
        ("bytes=-", 416, None),
        ("bytes=--5", 416, None),
    ],
)
def test_ranges(url: str, asked: str, status: int, part: slice | None) -> None:
    whole = httpx.get(f"{url}/{CHUNK}").content
    answer = httpx.get(f"{url}/{CHUNK}", headers={"Range": asked})
    assert answer.status_code == status
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"
        return
    assert answer.content == whole[part]
    start, stop, _ = part.indices(len(whole))
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


@pytest.mark.parametrize("path", [CHUNK, "compressed/precomputed/0/0-32_20-52_100-116"])
def test_what_a_client_has_is_not_sent_again(url: str, path: str) -> None:
    first = httpx.get(f"{url}/{path}")
    assert first.status_code == 200
    again = httpx.get(f"{url}/{path}", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = httpx.get(f"{url}/{path}", headers={"If-None-Match": '"another"'})
    assert other.content == first.content


def test_other_chunks_have_other_tags(url: str) -> None:
    tags = {httpx.get(f"{url}/compressed/zarr/0/c/0/{y}/0").headers["etag"] for y in range(3)}
    assert len(tags) == 3


def test_precomputed_is_packed_for_those_who_can_unpack(url: str) -> None:
    place = f"{url}/compressed/precomputed/0/0-32_20-52_100-116"
    packed = httpx.get(place, headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    plain = httpx.get(place, headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == packed.content
    assert len(plain.content) == 16 * 32 * 32


def test_pages_of_other_places_may_read(url: str) -> None:
    asked = {"Origin": "https://elsewhere.org"}
    answer = httpx.get(f"{url}/{CHUNK}", headers=asked | {"Range": "bytes=0-9"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "Content-Range" in answer.headers["access-control-expose-headers"]
    preflight = asked | {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "range"}
    assert httpx.options(f"{url}/{CHUNK}", headers=preflight).status_code == 200
    denied = asked | {"Access-Control-Request-Method": "DELETE"}
    assert httpx.options(f"{url}/{CHUNK}", headers=denied).status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "compressed/zarr/0/c/99/0/0",
        "compressed/zarr/3/c/0/0/0",
        "compressed/zarr/3/zarr.json",
        "compressed/zarr/0/c/-1/0/0",
        "compressed/zarr/0/c/0/0",
        "nothing/zarr/zarr.json",
        "nothing/precomputed/info",
        "compressed/precomputed/0/0-32_20-52_100-117",
        "compressed/precomputed/0/1-33_20-52_100-116",
        "compressed/precomputed/0/0-32_0-32_0-16",
        "compressed/precomputed/9/0-32_20-52_100-116",
        "compressed/precomputed/0/0-32",
        "compressed/precomputed/0/a-b_c-d_e-f",
        "compressed/zarr/0/c/99999999999999999999999/0/0",
        "em.zarr",
    ],
)
def test_what_is_not_there_is_not_found(url: str, path: str) -> None:
    assert httpx.get(f"{url}/{path}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v/ucray/../../../../../../etc/passwd",
        "/v/ucray/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/v/ucray//etc/passwd",
        "/compressed/zarr/0/c/../../../../zarr.json",
        "/..%2f..%2fetc%2fpasswd/zarr/zarr.json",
    ],
)
def test_no_path_leads_out(url: str, path: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer


def test_nothing_is_written(url: str) -> None:
    for method in ("PUT", "POST", "DELETE", "PATCH"):
        assert httpx.request(method, f"{url}/{CHUNK}").status_code == 405


def test_metrics_count_what_was_served(folder: Path) -> None:
    with served(application(str(folder / "em.ucray"), None, Limits(), None)) as url:
        for _ in range(3):
            httpx.get(f"{url}/{CHUNK}")
        httpx.get(f"{url}/compressed/zarr/0/c/99/0/0")
        text = httpx.get(f"{url}/metrics").text
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["ucray_serve_requests_total", ("kind", "zarr"), ("status", "200")] == 3
    assert samples["ucray_serve_requests_total", ("kind", "zarr"), ("status", "404")] == 1
    assert (samples["ucray_serve_cache_misses_total",], samples["ucray_serve_cache_hits_total",]) == (1, 2)
    assert samples["ucray_serve_cache_bytes",] > 0
    assert samples["ucray_serve_seconds_count", ("kind", "zarr")] == 4


def test_damage_is_said_and_not_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "em.ucray", tmp_path / "a")
    for shard in (file for file in (tmp_path / "a" / "0" / "c").rglob("*") if file.is_file()):
        data = bytearray(shard.read_bytes())
        data[10] ^= 0xFF
        shard.write_bytes(data)
    with served(application(str(tmp_path / "a"), None, Limits(), None)) as url:
        answer = httpx.get(f"{url}/{CHUNK}")
    assert answer.status_code == 502
    assert len(answer.text.splitlines()) == 1


def test_a_shard_that_is_missing_is_no_fill(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "em.ucray", tmp_path / "a")
    first = tmp_path / "a" / "0" / "c" / "0" / "0" / "0"
    first.rename(tmp_path / "shard")
    with served(application(str(tmp_path / "a"), None, Limits(), None)) as url:
        answer = httpx.get(f"{url}/compressed/zarr/0/c/0/0/0")
        assert (answer.status_code, "lacks 0/c/0/0/0" in answer.text) == (502, True)
        (tmp_path / "shard").rename(first)
        assert httpx.get(f"{url}/compressed/zarr/0/c/0/0/0").status_code == 200


def test_precomputed_begins_below_zero_where_the_volume_does() -> None:
    voxels = np.random.default_rng(0).integers(0, 255, (20, 30, 40)).astype(np.uint8)
    space = Space((8.0, 8.0, 8.0), (0.0, -80.0, -400.0), "nanometer")
    image = Image(
        "compressed", voxels.shape, "uint8", 0.0, (16, 16, 16), space, ((1, 1, 1),),
        lambda box: voxels[box.slices],
    )  # fmt: skip
    with served(gateway([image], {}, Limits())) as url:
        spec = {"driver": "neuroglancer_precomputed", "kvstore": f"{url}/compressed/precomputed/"}
        store = tensorstore.open(spec, open=True, read=True).result()
        assert list(store.domain.inclusive_min) == [-50, -10, 0, 0]
        found = store.read().result()[..., 0].transpose(2, 1, 0)
        np.testing.assert_array_equal(found, voxels)
        assert httpx.get(f"{url}/compressed/precomputed/0/-50--34_-10-6_0-17").status_code == 404


def _cache(budget: int, threads: int = 1, waiting: int = 100) -> ChunkCache:
    return ChunkCache(budget, threads, waiting, CollectorRegistry())


def _slowly(data: bytes) -> bytes:
    time.sleep(0.1)
    return data


def test_a_chunk_that_many_ask_for_is_made_once() -> None:
    made = []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"voxels"

    async def ask() -> list[Payload]:
        cache = _cache(1000, threads=4)
        found = await asyncio.gather(*(cache.get("chunk", make) for _ in range(20)))
        found.append(await cache.get("chunk", make))
        cache.close()
        return found

    found = asyncio.run(ask())
    assert len(made) == 1
    assert {gzip.decompress(one.gzipped) for one in found} == {b"voxels"}


def test_who_goes_away_does_not_take_the_chunk_from_others() -> None:
    async def ask() -> bytes:
        cache = _cache(1000)
        first = asyncio.create_task(cache.get("chunk", lambda: _slowly(b"voxels")))
        second = asyncio.create_task(cache.get("chunk", lambda: b"never"))
        await asyncio.sleep(0.02)
        first.cancel()
        found = await second
        cache.close()
        return gzip.decompress(found.gzipped)

    assert asyncio.run(ask()) == b"voxels"


def test_a_chunk_that_failed_is_tried_again() -> None:
    def fail() -> bytes:
        raise ArchiveError("damaged")

    async def ask() -> bytes:
        cache = _cache(1000)
        with pytest.raises(ArchiveError):
            await cache.get("chunk", fail)
        found = await cache.get("chunk", lambda: b"mended")
        cache.close()
        return gzip.decompress(found.gzipped)

    assert asyncio.run(ask()) == b"mended"


def test_the_cache_keeps_to_its_budget_and_drops_what_is_oldest() -> None:
    rng = np.random.default_rng(0)
    chunks = {name: rng.bytes(300) for name in "abcd"}
    made: list[str] = []

    async def ask(names: str) -> None:
        cache = _cache(1000)
        for name in names:

            def make(name: str = name) -> bytes:
                made.append(name)
                return chunks[name]

            await cache.get(name, make)
        assert cache._kept.currsize <= 1000
        cache.close()

    # Three of some 320 bytes have room: d takes the place of b, which was used before a.
    asyncio.run(ask("abcadab"))
    assert "".join(made) == "abcdb"


def test_a_chunk_beyond_the_budget_is_served_and_not_kept() -> None:
    async def ask() -> tuple[int, float]:
        cache = _cache(10)
        found = await cache.get("chunk", lambda: bytes(1000))
        size = cache._kept.currsize
        cache.close()
        return len(gzip.decompress(found.gzipped)), size

    assert asyncio.run(ask()) == (1000, 0)


def test_too_many_that_wait_are_sent_away() -> None:
    async def ask() -> list[Payload | BaseException]:
        cache = _cache(1000, threads=1, waiting=2)
        asked = [cache.get(n, lambda: _slowly(b"x")) for n in range(6)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        cache.close()
        return found

    assert [type(one) for one in asyncio.run(ask())] == [Payload] * 3 + [BusyError] * 3


def test_a_busy_gateway_says_when_to_come_back(folder: Path) -> None:
    limits = Limits(threads=1, waiting=0)
    with served(application(str(folder / "em.ucray"), None, limits, None)) as url:

        async def ask() -> list[httpx.Response]:
            async with httpx.AsyncClient(timeout=60) as client:
                paths = [
                    f"{url}/compressed/zarr/0/c/{z}/{y}/{x}"
                    for z in range(2)
                    for y in range(2)
                    for x in range(3)
                ]
                return await asyncio.gather(*map(client.get, paths))

        answers = asyncio.run(ask())
    busy = [answer for answer in answers if answer.status_code == 503]
    assert busy
    assert {answer.headers["retry-after"] for answer in busy} == {"1"}
    assert {answer.status_code for answer in answers} == {200, 503}


def test_another_volume_is_no_source(folder: Path, tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "other.zarr", shape=SHAPE, chunks=SHAPE, dtype="uint16")
    zarr.create_array(tmp_path / "small.zarr", shape=(4, 4, 4), chunks=(4, 4, 4), dtype="uint8")
    for name in ("other", "small"):
        with pytest.raises(SettingsError):
            application(str(folder / "em.ucray"), open_volume(str(tmp_path / f"{name}.zarr")), Limits(), None)


def test_the_command_serves_until_it_is_told_to_stop(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [COMMAND, "serve", str(folder / "em.ucray"), "--port", str(port)]
    process = subprocess.Popen([*command, "--cache", "1MiB"], stderr=subprocess.PIPE, text=True)
    try:

        def health() -> str | None:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/healthz").text
            except httpx.TransportError:
                return None

        assert wait_for(health, 60) == "well"
        figures = httpx.get(f"http://127.0.0.1:{port}/figures.json").json()
        assert figures["images"] == ["compressed"]
        assert figures["figures"]["asked for"] == "psnr 25"
    finally:
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=30)
    assert told.split() == [f"http://127.0.0.1:{port}/"]
    assert process.returncode == 0


def test_the_command_refuses_what_is_no_archive(tmp_path: Path) -> None:
    command = [COMMAND, "serve"]
    for extra in ([str(tmp_path / "none")], [str(tmp_path), "--cache", "much"]):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) <= 2


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine; apt-get install chromium")
def test_a_browser_shows_the_volume_s_voxels_beside_its_source(
    url: str, folder: Path, decoded: dict[str, Any], tmp_path: Path
) -> None:
    original: Any = zarr.open_group(folder / "em.zarr", mode="r")["0"]
    planes = [original[REGION][20], decoded["0"][20]]
    with Browser(tmp_path) as browser:
        browser.open(f"{url}/")

        seen: list[float] = []

        def drawn() -> bool:
            # Frames and coarser levels come first: what counts is where it ends.
            seen[:] = _differences(browser.picture().astype(int), planes)
            return len(seen) == 2 and max(seen) < 1.0

        try:
            wait_for(drawn, 90)
        except AssertionError:
            pytest.fail(f"the picture differs from the voxels by {seen} on average")
        assert browser.evaluate("document.title") == str(folder / "em.ucray")
        shown = browser.evaluate("document.getElementById('figures').innerText")
        assert re.search(r"40 x 90 x 120 uint8", shown)
        assert browser.problems == []


def _differences(picture: Any, planes: list[Any]) -> list[float]:
    """Mean difference of each panel from its plane; infinite where it has another size."""
    return [_difference(panel, plane) for panel, plane in zip(_panels(picture), planes, strict=False)]


def _difference(panel: Any, plane: Any) -> float:
    # One pixel a voxel. Which voxels the frame covers goes by the parity of the panel, so by the fonts of
    # the page: at most two at each face, and the shader rounds in its own way.
    hidden = np.subtract(plane.shape, panel.shape)
    if (hidden < 0).any() or (hidden > 4).any():
        return float("inf")
    seen = sliding_window_view(plane.astype(int), panel.shape)
    return float(np.abs(seen - panel).mean((-1, -2)).min())


def _panels(picture: Any) -> list[Any]:
    """What stands within the yellow frames that neuroglancer draws around volumes, from left to right."""
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 80)
    yellow[:100] = False
    found = []
    for left, right in ((0, picture.shape[1] // 2), (picture.shape[1] // 2, picture.shape[1])):
        half = yellow[:, left:right]
        if half.any():
            # A line of the frame is yellow from end to end, or nearly; the sides alone are a few pixels.
            rows = _between(half.sum(1))
            columns = _between(half.sum(0))
            found.append(picture[rows, left + columns.start : left + columns.stop, 0])
    return found


def _between(yellow: Any) -> slice:
    """What lies between the two lines of a frame, of how much of it each row (or column) shows."""
    (lines,) = np.nonzero(yellow > yellow.max() // 2)
    if len(lines) < 2:
        return slice(0, 0)
    gap = int(np.argmax(np.diff(lines)))
    return slice(int(lines[gap]) + 1, int(lines[gap + 1]))


def test_the_viewer_s_state_is_no_place_to_store_things(url: str) -> None:
    told = {"c": "tab", "g": 3, "pg": "", "s": {"position": [1, 2, 3]}}
    assert httpx.post(f"{url}/state/ucray", json=told).json() == {"g": "tab/3"}
    assert httpx.post(f"{url}/state/ucray", content=b"{").status_code == 400
    assert httpx.get(f"{url}/events/ucray").status_code == 400
    with httpx.stream("GET", f"{url}/events/ucray", params={"c": "tab"}) as stream:
        lines = [line for line, _ in zip(stream.iter_lines(), range(3), strict=False) if line]
    messages = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [message["k"] for message in messages] == ["c", "s"]
    assert [layer["name"] for layer in messages[1]["s"]["layers"]] == ["original", "compressed"]
