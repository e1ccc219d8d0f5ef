"""A full disk: one line, nothing left behind, and no row lost."""

import contextlib
import shutil
import subprocess

from running.device import Runtime
from running.errors import InputError
from running.files import create_npy

import numpy as np
import pytest
import rasterio
from helpers import Fork
from map_helpers import as_words, files, make_place, make_tile, map_tile, refused

import infer
import make_demo_data
from maps.geotiff import write_geotiff


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


# ---- 12: a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(("height", "width"), [(400, 300), (225, 300)])
def test_a_full_disk_ends_the_mapping_before_it_starts(place, tmp_path, small_disk, height, width):
    """Of these the maps do not fit, or the maps do and the pictures that follow may not."""
    tile = make_tile(tmp_path / "MGRS-large", height, width)
    arguments = {"checkpoint_path": place / "classifier.pt", "tile_path": tile}
    process = Fork(*as_words(output_dir=small_disk / "out", **arguments), script=infer)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith(f"error: {small_disk}/out/.")
    assert "disk full" in line
    assert "bytes are missing" in line
    assert not files(small_disk)


def test_a_full_disk_ends_the_simulation(tmp_path, small_disk):
    arguments = as_words(base_path=small_disk, size=128, device=None, wandb_mode=None)
    process = Fork(*arguments, script=make_demo_data)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert "bytes are missing" in err
    assert "bands.npy" in err
    assert not files(small_disk)


def test_a_disk_that_fills_up_later_costs_no_rows(place, tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr(Runtime, "block_pixels", 64)
    hog, write_pictures = small_disk / "hog", infer.write_pictures

    def fill_disk_and_write(*arguments):
        with open(hog, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        write_pictures(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(infer, "write_pictures", fill_disk_and_write)
        line = refused("disk full", map_tile, place, small_disk / "out")
    assert str(small_disk / "out") in line
    assert not (small_disk / "out/infer.json").exists()
    hog.unlink()
    monkeypatch.setattr(infer, "extract_representations", lambda *_, **__: iter(()))
    map_tile(place, small_disk / "out")  # all rows were there
    assert np.isfinite(np.load(small_disk / "out/representation_map.npy")).any()


def test_a_geotiff_that_is_not_whole_takes_no_place(tmp_path, small_disk):
    """Regression: GDAL reports no error for a full disk at its close: a broken file was kept."""
    noise = np.random.default_rng(0).integers(0, 255, (500, 500), np.uint8)
    place = {"crs": "EPSG:32633", "transform": [10, 0, 500_000, 0, -10, 5_000_000]}
    path = small_disk / "map.tif"
    write_geotiff(path, noise, place, 0)
    before = path.read_bytes()
    refusals = 0
    for free in range(200_000, 1_000_000, 32768):  # twice the file, see maps/geotiff.py
        with open(small_disk / "hog", "wb") as hog:
            hog.write(bytes(shutil.disk_usage(small_disk).free - free))
        try:
            write_geotiff(path, noise[::-1], place, 0)
        except InputError as error:
            assert "could not be written" in str(error)
            assert path.read_bytes() == before
            refusals += 1
        else:
            with rasterio.open(path) as file:
                assert (file.read(1) == noise[::-1]).all()
            path.write_bytes(before)
        (small_disk / "hog").unlink()
    assert 0 < refusals < 25


def test_space_is_reserved(tmp_path):
    array = create_npy(tmp_path / "map.npy", np.float32, (1000, 300))
    assert (tmp_path / "map.npy").stat().st_blocks * 512 >= array.nbytes
    assert not array.any()
    np.save(tmp_path / "same.npy", np.zeros((1000, 300), np.float32))
    assert (tmp_path / "map.npy").read_bytes() == (tmp_path / "same.npy").read_bytes()
