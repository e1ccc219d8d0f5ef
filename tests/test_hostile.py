"""Hostile and damaged files: no payload runs, no absurd size is allocated, no path leads outside.

Readers of tiles, checkpoints, false-colour bases and infer.json are given 10,000 damaged files by
hypothesis; what they raise is the project's own one-line error, or nothing.
"""

import json
import os
import pickle
import tempfile
import tracemalloc
from pathlib import Path

from running.checkpoints import load_checkpoint
from running.errors import InputError
from running.files import open_npy
from running.tile_json import is_georeferenced

import numpy as np
import pytest
import torch
from helpers import make_tile, run, save_small_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import infer
from backbones import load_backbone, load_classifier
from maps import false_color
from maps.land_cover import class_legend
from maps.reader import open_representations, read_provenance
from tiles import Tile

EXAMPLES = {"npy": 3000, "tile.json": 1000, "checkpoint": 1000, "basis": 3500, "infer.json": 500}
pytestmark = pytest.mark.filterwarnings("ignore")  # torch and numpy warn of what is damaged
settings.register_profile(
    "fuzz",
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def fuzz(name, *strategies):
    """Run a test on EXAMPLES[name] examples of strategies; the same ones every time."""
    options = settings(settings.get_profile("fuzz"), max_examples=EXAMPLES[name])
    return lambda test: options(given(*strategies)(test))


def own_errors_only(function, *arguments):
    """Call a reader; its message, where it refuses, is one line."""
    try:
        return function(*arguments)
    except InputError as error:
        assert "\n" not in str(error)
        return None


# ---- damage --------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8)
CUT = st.none() | st.integers(0, 1 << 16)


def damage(content, edits, cut):
    """Bytes with some of them changed, and the rest cut off."""
    content = bytearray(content)
    for place, byte in edits:
        content[place % len(content)] = byte
    return bytes(content if cut is None else content[: cut % len(content)])


@pytest.fixture(scope="module")
def memory():
    """A folder in memory, where there is one, since files are written 15,000 times."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def tile(memory):
    return make_tile(memory / "MGRS-0", (4, 4, 4, 3), clear=1.0)


@pytest.fixture(scope="module")
def whole(tile):
    """The content of every file of the tile, to put back."""
    return {path.name: path.read_bytes() for path in tile.iterdir()}


ARRAYS = ("bands", "masks", "doys", "band_mean", "band_std", "labels")


@pytest.mark.slow
def test_damaged_arrays(tile, whole):
    @fuzz("npy", st.sampled_from(ARRAYS), EDITS, CUT, st.booleans())
    def check(name, edits, cut, in_header):
        content = whole[f"{name}.npy"]
        if in_header:  # where damage is read, and not only another value
            edits = [(place % 128, byte) for place, byte in edits]
        file = tile / f"{name}.npy"
        file.write_bytes(damage(content, edits, cut))
        opened = own_errors_only(Tile, tile)
        if opened:
            own_errors_only(opened.clear_counts)
        own_errors_only(open_representations, file)
        file.write_bytes(content)

    check()


@pytest.mark.slow
def test_damaged_tile_json(tile, whole):
    keys = st.sampled_from(["bands", "dates", "crs", "transform", "classes", "simulated", "x"])
    some = st.dictionaries(keys, JSON, max_size=5)

    @fuzz("tile.json", st.booleans(), some, EDITS, CUT)
    def check(keeps_form, content, edits, cut):
        text = json.dumps({"bands": ["X0", "X1", "X2"]} | content).encode()
        (tile / "tile.json").write_bytes(text if keeps_form else damage(text, edits, cut))
        opened = own_errors_only(Tile, tile)
        if opened:
            opened.split_map(4)
            class_legend([0, 10, 255], opened.info.get("classes", {}))

    check()
    (tile / "tile.json").write_bytes(whole["tile.json"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrained", "classifier"])
def test_damaged_checkpoints(workplace, memory, name):
    content = torch.load(workplace / name / "best.pt", weights_only=True)
    small = {key: content[key] for key in content if not key.startswith("optimiser")}
    whole_file = (workplace / name / "best.pt").read_bytes()
    path = memory / "damaged.pt"
    load = load_classifier if name == "classifier" else load_backbone
    odd = JSON | st.builds(lambda n: torch.full((n,), float("nan")), st.integers(0, 12))

    @fuzz("checkpoint", st.booleans(), st.sampled_from(sorted(small)), odd, EDITS, CUT)
    def check(keeps_form, key, value, edits, cut):
        if keeps_form:
            torch.save(small | {key: value}, path)
        else:
            path.write_bytes(damage(whole_file, edits, cut))
        opened = own_errors_only(load_checkpoint, path)
        if opened and opened["kind"] == name:
            own_errors_only(load, opened)

    check()


@pytest.mark.slow
def test_damaged_bases(memory):
    path = memory / "basis.npz"
    pixels = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    false_color.save_basis(false_color.fit_basis(pixels), {"checkpoint_sha256": "a hash"}, path)
    content = path.read_bytes()

    @fuzz("basis", EDITS.filter(bool), CUT)
    def check(edits, cut):
        path.write_bytes(damage(content, edits, cut))
        own_errors_only(false_color.load_basis, path, 6)

    check()


@pytest.mark.slow
def test_damaged_infer_json(memory):
    keys = st.sampled_from(["crs", "transform", "classes", "tile", "tile_path", "x"])
    some = st.dictionaries(keys, JSON, max_size=5) | JSON
    file = memory / "infer.json"

    @fuzz("infer.json", st.booleans(), some, EDITS, CUT)
    def check(keeps_form, content, edits, cut):
        text = json.dumps(content).encode()
        file.write_bytes(text if keeps_form else damage(text, edits, cut))
        info = own_errors_only(read_provenance, memory / "map.npy")
        if info:
            class_legend([0, 10], info.get("classes", {}))
            is_georeferenced(info)

    check()


def test_there_are_enough_cases():
    total = sum(EXAMPLES.values()) + EXAMPLES["checkpoint"]  # of two kinds of checkpoint
    print(f"\n{total} damaged files")
    assert total >= 10_000


# ---- payloads, sizes, paths ----------------------------------------------------------------------


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_payload_never_runs(tile, whole, tmp_path):
    ran = tmp_path / "ran"
    harm = np.array([Payload(ran)], object)
    for name in (*ARRAYS, "splits"):
        np.save(tile / f"{name}.npy", harm, allow_pickle=True)
        with pytest.raises(InputError, match=f"{name}.npy: found no readable array"):
            Tile(tile)
        (tile / f"{name}.npy").unlink()
        if f"{name}.npy" in whole:
            (tile / f"{name}.npy").write_bytes(whole[f"{name}.npy"])
    torch.save({"format": 1, "kind": "pretrained", "config": Payload(ran)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Payload(ran)))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(InputError, match="found no whole checkpoint"):
            load_checkpoint(tmp_path / name)
    np.savez(tmp_path / "basis.npz", components=harm, mean=harm, low=harm, high=harm)
    with pytest.raises(InputError, match="basis.npz: found no basis"):
        false_color.load_basis(tmp_path / "basis.npz", 6)
    assert not ran.exists()


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62,), (1 << 31, 1 << 31), (1 << 70,), (-5,)])
def test_an_absurd_size_fails_before_anything_is_allocated(tmp_path, shape):
    file = tmp_path / "bands.npy"
    with open(file, "wb") as out:
        header = {"descr": "<u2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        out.write(b"\0" * 64)
    tracemalloc.start()
    with pytest.raises(InputError, match="bands.npy: found no readable array"):
        open_npy(file, "an array")
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_names_from_files_lead_to_no_path(workplace, tmp_path):
    """Tile names, classes and titles of a tile.json are text for people, never parts of a path."""
    evil = "../../../evil"
    classes = {"40": {"name": evil, "color": "#00ff00"}}
    tile = make_tile(
        tmp_path / "tiles/MGRS-0", (20, 8, 8, 10), classes=classes, tile=evil, name=evil
    )
    out = tmp_path / "deep/er/out"
    run(infer, checkpoint_path=workplace / "classifier/best.pt", tile_path=tile, output_dir=out)
    content = torch.load(workplace / "classifier/best.pt", weights_only=True)
    content["classes"] = {"40": {"name": evil}, "95": {"name": evil}}
    save_small_checkpoint(tmp_path / "unused.pt")
    assert not list(tmp_path.rglob("evil*"))
    assert {path.name for path in tmp_path.iterdir()} == {"tiles", "deep", "unused.pt"}
