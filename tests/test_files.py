"""Files that are never half, checkpoints that are ours, and paths that are wrong."""

import ctypes
import mmap
import os
import subprocess
import time

from running.checkpoints import load_checkpoint
from running.errors import InputError, what_is_there
from running.files import (
    atomic_write,
    fetch_columns,
    near_parts,
    open_npy,
    read_sparsely,
)

import numpy as np
import pytest
import torch
from helpers import map_tile, run, save_small_checkpoint, tile_of
from map_helpers import make_tile

import create_false_color_map
import explore
import infer
import label_efficiency
import read_inference_map
import train
import train_classification_maddy as maddy
from tiles import Tile


def test_atomic_write_leaves_nothing_half(tmp_path):
    target = tmp_path / "file.npy"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoints_of_others_are_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"format": 99, "kind": "pretrained"}, tmp_path / "newer.pt")
    torch.save({"run": subprocess.Popen}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    save_small_checkpoint(tmp_path / "ours.pt", step=1)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/best.pt").touch()
    for name, message in {
        "foreign.pt": "of another program",
        "newer.pt": "found format 99, wanted 1",
        "code.pt": "no whole checkpoint",
        "text.pt": "no whole checkpoint",
        "nwer.pt": "found no file, wanted a checkpoint; .* has newer.pt, ",
        "ours": "found a folder, wanted a checkpoint; .*/ours has best.pt",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert load_checkpoint(tmp_path / "ours.pt")["step"] == 1
    with pytest.raises(InputError, match="a pretrained checkpoint, wanted a classifier one"):
        load_checkpoint(tmp_path / "ours.pt", ("classifier",))


@pytest.mark.parametrize("value", ["ten", 2.5, None, -1])
def test_a_checkpoint_with_an_odd_config_is_refused(tmp_path, value):
    """Regression: min_valid="ten" was a traceback hours later, where pixels are chosen."""
    save_small_checkpoint(tmp_path / "odd.pt", config={"min_valid": value})
    with pytest.raises(InputError, match="odd.pt: found no usable config"):
        load_checkpoint(tmp_path / "odd.pt")


# ---- wrong paths ---------------------------------------------------------------------------------


def test_a_wrong_path_lists_what_is_there(tmp_path, monkeypatch):
    """Names like the wrong one first, then in order, a few of many; hidden ones are left out."""
    for name in ("austria_2022", "tyrol_2023", "b", "c", "d", "e", "f", ".hidden", "two\nlines"):
        (tmp_path / "data" / name).mkdir(parents=True)
    there = what_is_there(tmp_path / "data/tirol_2023/processed/MGRS-1/bands.npy")
    assert there == f"; {tmp_path}/data has tyrol_2023, austria_2022, b, c, d, e and 1 more"
    assert what_is_there(tmp_path / "data/b").endswith("/b has nothing")
    monkeypatch.chdir(tmp_path)
    assert what_is_there("checkpoints/one/best.pt") == "; this folder has data"
    assert what_is_there("date/one") == "; this folder has data"


@pytest.fixture(scope="module")
def maps(workplace, tmp_path_factory):
    """The folder of the maps of a tile."""
    return map_tile(workplace, tmp_path_factory.mktemp("maps"))[0]


WRONG = {  # script, keys of a wrong path, and what is listed
    "a data set": (train, {"dataset_name": "toi"}, "data has toy$"),
    "the folder above": (train, {"base_path": "{workplace}/dat"}, "has data, "),
    "a picture's tile": (
        train,
        {"test_tile_path": "{tiles}/MGRS-O"},
        "processed has MGRS-0, MGRS-1$",
    ),
    "an encoder": (train, {"checkpoint_path": "{workplace}/pretrain/best.pt"}, "has pretrained, "),
    "a checkpoint": (infer, {"checkpoint_path": "{workplace}/classifier/bets.pt"}, "has best.pt, "),
    "a folder": (infer, {"checkpoint_path": "{workplace}/classifier"}, "has best.pt, "),
    "a tile": (infer, {"tile_path": "{tiles}/MGRS-9"}, "has MGRS-0, MGRS-1$"),
    "tiles": (infer, {"tile_path": "{workplace}/data/toy/procesed"}, "toy has processed$"),
    "a map": (read_inference_map, {"map_path": "{maps}/class.npy"}, "has classification_map.npy, "),
    "labels": (read_inference_map, {"labels_path": "{tiles}/MGRS-0/label.npy"}, "has labels.npy, "),
    "representations": (
        explore,
        {"representation_path": "{maps}/representation.npy"},
        "has representation_",
    ),
    "one of two": (
        create_false_color_map,
        {"representation_path": "{maps}/representation_map.npy,{maps}/representation.npy"},
        "has representation_map.npy, ",
    ),
    "the page's tile": (explore, {"tile_path": "{tiles}/SIM-0"}, "has MGRS-0, MGRS-1$"),
    "own labels": (maddy, {"labels_path": "{tiles}/MGRS-0/lables.npy"}, "has labels.npy, "),
    "scored": (label_efficiency, {"checkpoint_path": "{workplace}/pretrained/b.pt"}, "has best.pt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_wrong_path_of_a_script_lists_what_is_there(workplace, maps, tmp_path, name):
    script, wrong, listed = WRONG[name]
    places = {"workplace": workplace, "tiles": tile_of(workplace).parent, "maps": maps}
    right = {
        "base_path": workplace,
        "dataset_name": "toy",
        "checkpoint_path": workplace / "classifier/best.pt" if script is infer else "",
        "tile_path": tile_of(workplace) if script is infer else "",
        "map_path": maps / "classification_map.npy",
        "representation_path": maps / "representation_map.npy",
        "output_dir": tmp_path / "out",
        "block_size": 4,
        "min_valid": 5 if script is train else 0,
    }
    keys = right | {key: text.format(**places) for key, text in wrong.items()}
    with pytest.raises(InputError, match=listed) as error:
        run(script, **{key: value for key, value in keys.items() if key in script.run_config})
    assert "\n" not in str(error.value)


def test_parts_of_places_are_near_each_other():
    places = np.r_[0:700, 5000:5300, 90_000:90_010]
    parts = [(part.start, part.stop) for part in near_parts(places, 512)]
    assert parts == [(0, 512), (512, 700), (700, 1000), (1000, 1010)]
    points = np.arange(0, 1_000_000, 1000)
    assert [part.stop for part in near_parts(points, 512)] == [512, 1000]
    assert near_parts(points[:0], 512) == []


def test_advice_to_the_kernel_changes_no_number(tmp_path):
    """Of a mapped file, of a part in memory, and where the end of the file is in the last page."""
    values = np.random.default_rng(0).integers(0, 9999, (5, 3001, 7)).astype(np.uint16)
    np.save(tmp_path / "bands.npy", values)
    for array in (open_npy(tmp_path / "bands.npy", "an array"), values):
        for low, high in ((0, 10), (1234, 2900), (2990, 3001)):
            fetch_columns(array, low, high)
            np.testing.assert_array_equal(array[:, low:high], values[:, low:high])
        with read_sparsely(array):
            np.testing.assert_array_equal(array[::2, 17], values[::2, 17])


# ---- what is read of a large file ----------------------------------------------------------------


def pages_in_memory(path):
    """Numbers of the pages of a file that the kernel has read from the disk, and holds."""
    mapped = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (mapped, pages))
    assert ctypes.CDLL(None).mincore(next(addresses), ctypes.c_size_t(mapped.size), *addresses) == 0
    return np.flatnonzero(pages & 1)


@pytest.fixture
def on_disk(tmp_path):
    """A tile with 12 MB of observations, and a function that sees to it that none is in memory."""
    tile = make_tile(tmp_path / "MGRS-0", 256, 512)

    def forget():
        with open(tile / "bands.npy", "rb") as file:
            os.fsync(file)  # pages that are not written yet would stay
            for _ in range(20):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if not len(pages_in_memory(tile / "bands.npy")):
                    return
                time.sleep(0.05)
        pytest.skip("this file system keeps what was read in memory")

    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system has no advice to forget a file")
    return tile, forget


FEW = 12_000_000 // 8 // mmap.PAGESIZE  # pages: an eighth of the file


def test_few_places_of_a_large_file_are_read_without_their_surroundings(on_disk):
    """A thousand places were a whole file, by a kernel that reads ahead of each."""
    tile, forget = on_disk
    bands = open_npy(tile / "bands.npy", "an array")
    forget()
    with read_sparsely(bands):
        for row in range(0, 240, 20):
            assert (bands[:, row, :16] > 0).all()
    assert 144 <= len(pages_in_memory(tile / "bands.npy")) < FEW


def test_a_fingerprint_of_a_large_tile_reads_few_of_its_pages(on_disk):
    tile, forget = on_disk
    opened = Tile(tile)
    forget()
    opened.fingerprint()
    assert 12 <= len(pages_in_memory(tile / "bands.npy")) < FEW


def test_columns_of_a_large_file_are_fetched_at_once_and_alone(on_disk):
    tile, forget = on_disk
    bands = open_npy(tile / "bands.npy", "an array").reshape(12, -1, 4)
    places = np.r_[500:800, 30_000:30_100]
    firsts = bands.offset + np.add.outer(np.arange(12) * bands.strides[0], places * 8)
    wanted = {*(firsts // mmap.PAGESIZE).ravel().tolist()}
    forget()
    for part in near_parts(places, 512):
        fetch_columns(bands, places[part].min(), places[part].max() + 1)
    end = time.monotonic() + 10
    while not wanted <= {*(found := pages_in_memory(tile / "bands.npy").tolist())}:
        assert time.monotonic() < end, "pages are missing that were to be fetched"
        time.sleep(0.01)
    assert len(found) < FEW
    assert (bands[:, places] > 0).all()
    assert pages_in_memory(tile / "bands.npy").tolist() == found


@pytest.mark.parametrize("jump", [30_000, 90_000])
def test_pixels_of_a_large_tile_are_read_without_those_between_them(on_disk, jump):
    tile, forget = on_disk
    opened, pixels = Tile(tile), np.r_[500:800, 500 + jump : 600 + jump]
    forget()
    bands, _ = opened.read_dates(pixels, torch.arange(12).expand(len(pixels), 12))
    assert 12 <= len(pages_in_memory(tile / "bands.npy")) < FEW
    wanted = np.load(tile / "bands.npy").reshape(12, -1, 4)[:, pixels]
    np.testing.assert_array_equal(bands.numpy(), wanted.swapaxes(0, 1))
