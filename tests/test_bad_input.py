"""Malformed tiles end in one line that names file, found and wanted; awkward but legal ones work.

The number of cases is printed (pytest -s) and asserted at the end of each half.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    GEOREFERENCE,
    ROOT,
    in_child,
    make_dataset,
    make_tile,
    run,
    save,
    tile_of,
    tiny,
)

import infer
import train
from running.errors import InputError
from running.script import run_script
from tiles import Tile

SHAPE = (6, 8, 8, 3)  # of the tiles here: T, H, W, B
REQUIRED = ("bands", "masks", "doys", "band_mean", "band_std")
ARRAYS = (*REQUIRED, "labels", "splits")


# ---- ways to break a file ------------------------------------------------------------------------


def missing(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut_off(file):
    file.write_bytes(file.read_bytes()[:-5])


def half_a_header(file):
    file.write_bytes(file.read_bytes()[:40])


def text(file):
    file.write_text("no array")


def a_folder(file):
    file.unlink()
    file.mkdir()


def broken_link(file):
    file.unlink()
    file.symlink_to("nowhere")


def pickled(file):
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)


def as_text(file):
    np.save(file, np.load(file).astype("U5"))


def as_complex(file):
    np.save(file, np.load(file).astype(complex))


def a_rank_more(file):
    np.save(file, np.load(file)[None])


def other_shape(file):
    np.save(file, np.load(file)[:-1])


def no_elements(file):
    np.save(file, np.load(file)[:0])


def absurd_size(file):
    """A header that declares 2 EiB: refused before anything is allocated."""
    array = np.load(file)
    with open(file, "wb") as out:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": (1 << 61,)}
        np.lib.format.write_array_header_1_0(out, header)


def fortran(file):
    np.save(file, np.asfortranarray(np.load(file)))


def value(number, place=(0,)):
    def put(file):
        array = np.load(file)
        array[place] = number
        np.save(file, array)

    put.__name__ = f"value_{number}"
    return put


def json_with(**content):
    def write(file):
        file.write_text(json.dumps(json.loads(file.read_text()) | content))

    write.__name__ = "_".join(f"{key}_{value}" for key, value in content.items())[:60]
    return write


def json_text(content):
    def write(file):
        file.write_text(content)

    write.__name__ = f"text_{content[:20]}"
    return write


CASES = [(f"{name}.npy", damage) for name in REQUIRED for damage in (missing,)]
CASES += [
    (f"{name}.npy", damage)
    for name in ARRAYS
    for damage in (empty, cut_off, pickled, a_folder, broken_link, absurd_size)
]
CASES += [("bands.npy", damage) for damage in (half_a_header, text, as_text, as_complex, fortran)]
CASES += [("masks.npy", damage) for damage in (a_rank_more, other_shape, no_elements, fortran)]
CASES += [("labels.npy", damage) for damage in (a_rank_more, other_shape, as_complex)]
CASES += [("splits.npy", damage) for damage in (other_shape, value(4), as_text)]
CASES += [("doys.npy", damage) for damage in (value(0), value(367, (5,)), value(300), other_shape)]
CASES += [("band_mean.npy", damage) for damage in (value(np.nan), value(np.inf), other_shape)]
CASES += [("band_std.npy", damage) for damage in (value(np.nan), value(-1.0), value(0.0))]
CASES += [("masks.npy", value(2)), ("bands.npy", a_rank_more), ("bands.npy", no_elements)]
CASES += [
    ("tile.json", damage)
    for damage in (
        json_text(""),
        json_text("[1, 2]"),
        json_text('{"bands": ["B02"'),
        json_text("[" * 100_000),
        json_text('{"transform": [NaN, 0, 0, 0, -10, 0], "crs": "EPSG:32631"}'),
        a_folder,
        json_with(bands=None),
        json_with(bands=["B02"]),
        json_with(bands=["B02", "B02", "B03"]),
        json_with(bands=[1, 2, 3]),
        json_with(dates="2021"),
        json_with(dates=["2021-01-01"]),
        json_with(crs=None),
        json_with(crs={"nested": "EPSG:32631"}),
        json_with(crs="EPSG:999999"),
        json_with(crs="nowhere"),
        json_with(crs="EPSG:32631", transform=None),
        json_with(crs="EPSG:32631", transform=[10, 0, 0]),
        json_with(crs="EPSG:32631", transform=[[10, 0, 0], [0, -10, 0]]),
        json_with(crs="EPSG:32631", transform=[0, 0, 0, 0, 0, 0]),
        json_with(crs="EPSG:32631", transform=["10", 0, 0, 0, -10, 0]),
        json_with(transform=[10, 0, 0, 0, -10, 0]),
        json_with(classes=None),
        json_with(classes=["Corn"]),
        json_with(classes={"corn": {"name": "Corn"}}),
        json_with(classes={"300": {"name": "Corn"}}),
        json_with(classes={"0": {"name": "no data"}}),
        json_with(classes={"40": {"color": "#00ff00"}}),
        json_with(classes={"40": {"name": "Corn", "color": "greenish"}}),
        json_with(classes={"40": "Corn"}),
        json_with(simulated="perhaps"),
    )
]


def small_tile(folder, **keywords):
    """A tile with every file that the contract knows."""
    tile = make_tile(folder, SHAPE, clear=1.0, **keywords)
    splits = np.ones(SHAPE[1:3], np.uint8)
    splits[:2], splits[2:4] = 2, 3
    save(tile, "splits", splits)
    return tile


@pytest.mark.parametrize(
    ("name", "damage"), CASES, ids=lambda case: getattr(case, "__name__", case)
)
def test_a_malformed_tile_is_refused_in_one_line(tmp_path, name, damage, monkeypatch):
    """Before the first step, with status not 0, and with nothing written."""
    for number in range(2):
        small_tile(tile_of(tmp_path, number))
    file = tile_of(tmp_path, 1) / name
    damage(file)
    config = tiny(tmp_path, tmp_path / "out", min_valid=2, batch_size=16)
    arguments = [f"{k}={v}" for k, v in config.items() if v != train.run_config[k]]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as error:
        run_script(train.main, train.run_config, train.__doc__)
    message = str(error.value)
    assert message.startswith("error: ")
    assert str(file) in message
    assert "found" in message
    assert "wanted" in message
    assert "\n" not in message
    assert len(message) < 1000
    assert not (tmp_path / "out").exists()


def test_there_are_enough_malformed_inputs():
    print(f"\n{len(CASES)} malformed inputs")
    assert len(CASES) >= 60


def test_unreadable_files():
    """Of another user, in a folder that may be read; root, who reads all, becomes nobody for it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        tile = small_tile(Path(folder) / "MGRS-0")
        (tile / "bands.npy").chmod(0)

        def open_tile():
            if os.geteuid() == 0:
                os.setuid(65534)
            with pytest.raises(InputError, match="bands.npy: found no readable array .*denied"):
                Tile(tile)

        assert in_child(open_tile) == 0


def test_one_bad_tile_among_good_ones_is_left_out_where_asked(tmp_path, capsys):
    """With a warning and a count, in training as in mapping."""
    for number in range(3):
        small_tile(tile_of(tmp_path, number))
    cut_off(tile_of(tmp_path, 1) / "bands.npy")
    value(2)(tile_of(tmp_path, 2) / "masks.npy")
    config = tiny(tmp_path, tmp_path / "out", min_valid=2, batch_size=16, max_steps=2)
    with pytest.raises(InputError, match="MGRS-1/bands.npy: found no readable array"):
        train.main(config)
    assert train.main({**config, "skip_bad_tiles": True})["step"] == 2
    out = capsys.readouterr().out
    assert "left out: " in out
    assert "2 of 3 tiles left out" in out
    folder = tile_of(tmp_path).parent
    path = tmp_path / "out/best.pt"
    keywords = {"checkpoint_path": path, "tile_path": folder, "output_dir": tmp_path / "maps"}
    (mapped,) = run(infer, skip_bad_tiles=True, **keywords)
    assert mapped.name == "MGRS-0"


# ---- awkward, but legal --------------------------------------------------------------------------


def odd_shape(*shape):
    def make(folder, number):
        make_tile(folder, shape, clear=1.0, seed=number)

    make.__name__ = f"shape_{shape}"
    return make


def with_arrays(**arrays):
    """A tile with arrays in place of its own; a function gets the array that it replaces."""

    def make(folder, number):
        tile = small_tile(folder, seed=number)
        for name, array in arrays.items():
            old = np.load(tile / f"{name}.npy")
            save(tile, name, array(old) if callable(array) else array)

    make.__name__ = "_".join(arrays)
    return make


def extremes(bands):
    bands[:, ::2] = 0
    bands[:, 1::2] = 65535
    return bands


def read_only(folder, number):
    tile = small_tile(folder, seed=number)
    for file in tile.iterdir():
        file.chmod(0o444)


def without_json(folder, number):
    (small_tile(folder, seed=number) / "tile.json").unlink()


def with_json(**content):
    def make(folder, number):
        json_with(**content)(small_tile(folder, seed=number) / "tile.json")

    make.__name__ = f"json_{'_'.join(content)}"
    return make


def linked(folder, number):
    target = small_tile(folder.parents[3] / f"elsewhere/{folder.name}", seed=number)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(target)


DAYS = np.array([1, 1, 60, 60, 366, 366])
AWKWARD = {
    "one date": (odd_shape(1, 8, 8, 3), {"min_valid": 1}),
    "one band": (odd_shape(6, 8, 8, 1), {}),
    "thirteen bands": (odd_shape(6, 8, 8, 13), {}),
    "one row": (odd_shape(6, 1, 64, 3), {}),
    "one column": (odd_shape(6, 64, 1, 3), {}),
    "more dates than days": (odd_shape(300, 8, 8, 3), {}),
    "doy 366 and doys twice": (with_arrays(doys=DAYS), {}),
    "all on one day": (with_arrays(doys=np.full(6, 200)), {}),
    "doys as int64": (with_arrays(doys=lambda doys: doys.astype(np.int64)), {}),
    "values 0 and 65535": (with_arrays(bands=extremes), {}),
    "statistics as float64": (
        with_arrays(band_std=lambda std: std.astype(float), band_mean=np.zeros(3)),
        {},
    ),
    "no labels": (with_arrays(labels=lambda labels: 0 * labels), {}),
    "labels of code 255": (with_arrays(labels=lambda labels: 0 * labels + 255), {}),
    "read-only files": (read_only, {}),
    "no tile.json": (without_json, {}),
    "empty list of bands": (with_json(bands=[]), {}),
    "unknown keys in tile.json": (with_json(sensor={"name": "S2A"}, note=None), {}),
    "a CRS in degrees": (with_json(crs="EPSG:4326", transform=[1e-4, 0, 5, 0, -1e-4, 50]), {}),
    "a rotated grid": (with_json(**GEOREFERENCE | {"transform": [7, 7, 0, 7, -7, 0]}), {}),
    "links to tiles": (linked, {}),
    "five loader workers": (small_tile, {"num_workers": 5}),
    "batch larger than the data": (small_tile, {"batch_size": 1_000_000}),
    "blocks larger than the tile": (small_tile, {"block_size": 1_000_000}),
    "sample size beyond the dates": (small_tile, {"sample_size": 100}),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_an_awkward_but_legal_data_set_trains_and_maps(tmp_path, name):
    make, keywords = AWKWARD[name]
    base_path = tmp_path / "with space and Ümläut 中"
    for number in range(2):
        folder = tile_of(base_path, number)
        make(folder, number) if make is not small_tile else small_tile(folder, seed=number)
    standard = {"min_valid": 2, "batch_size": 16, "max_steps": 3, "block_size": 2}
    config = tiny(base_path, base_path / "out", **standard | keywords)
    assert np.isfinite(train.main(config)["loss"])
    keywords = {"checkpoint_path": base_path / "out/best.pt", "output_dir": base_path / "map"}
    (folder,) = run(infer, tile_path=tile_of(base_path), **keywords)
    assert np.isfinite(np.load(folder / "representation_map.npy")).any()


def test_a_tile_of_one_pixel_maps(tmp_path):
    base_path = make_dataset(tmp_path)
    train.main(tiny(base_path, tmp_path / "out", max_steps=2))
    tile = make_tile(tmp_path / "MGRS-one", (20, 1, 1, 10), clear=1.0)
    keywords = {"checkpoint_path": tmp_path / "out/best.pt", "output_dir": tmp_path / "map"}
    (folder,) = run(infer, tile_path=tile, **keywords)
    assert np.load(folder / "representation_map.npy").shape == (1, 1, 16)


@pytest.mark.slow
def test_three_hundred_tiles_and_another_working_directory(tmp_path, monkeypatch):
    for number in range(300):
        small_tile(tile_of(tmp_path, number), seed=number)
    monkeypatch.chdir(tmp_path)
    result = train.main(tiny(".", "out", min_valid=2, batch_size=512, max_steps=3))
    assert np.isfinite(result["loss"])
    assert (tmp_path / "out/best.pt").exists()
    assert not (ROOT / "out").exists()


def test_there_are_enough_awkward_inputs():
    print(f"\n{len(AWKWARD) + 2} awkward inputs")
    assert len(AWKWARD) + 2 >= 20
