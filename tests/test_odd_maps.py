"""Maps that do not go together, odd arrays, numbers too large, folders of others: one line each."""

import json
import math
import os

import numpy as np
import pytest
from browser import make_page, random_map, save_map
from helpers import run
from map_helpers import refused

import create_false_color_map
import explore
import label_efficiency
import make_demo_data
import maps
import runtime
import train_classification_maddy
from false_color import fit_basis, save_basis
from tiles import read_tile_json

SHAPE = (20, 30)


@pytest.fixture
def representations(tmp_path):
    """A representation map in out/ with nothing else beside it but infer.json."""
    return save_map(tmp_path / "out", random_map((*SHAPE, 6)), checkpoint_sha256="a" * 64)


def draw(**keywords):
    return run(create_false_color_map, **keywords)


def train_head(representation_path, **keywords):
    """train_classification_maddy.py on labels in two halves."""
    labels = np.full(SHAPE, 10, np.uint8)
    labels[:, 15:] = 20
    labels_path = representation_path.parent / "labels.npy"
    np.save(labels_path, labels)
    keywords = {"representation_path": representation_path, "epochs": 1, **keywords}
    return run(train_classification_maddy, labels_path=labels_path, **keywords)


# ---- maps that do not go together ----------------------------------------------------------------


@pytest.mark.parametrize("script", [make_page, draw])
def test_maps_of_two_checkpoints_are_refused(representations, tmp_path, script, capsys):
    other = save_map(tmp_path / "b", random_map((*SHAPE, 6)), checkpoint_sha256="b" * 64)
    both = f"{representations},{other}"
    line = refused("found a map of checkpoint bbbbbbbbbbbb", script, representation_path=both)
    assert line.startswith(str(other))
    save_map(tmp_path / "b", random_map((*SHAPE, 6)))
    script(representation_path=both)
    assert f"{other}: not known whether it is of the checkpoint" in capsys.readouterr().out


def test_a_basis_of_another_checkpoint_is_refused(representations, tmp_path):
    basis = tmp_path / "basis.npz"
    save_basis(fit_basis(random_map().reshape(-1, 6)), "b" * 64, basis)
    keywords = {"representation_path": representations, "basis_path": basis}
    for script in (make_page, draw):
        refused("basis.npz: found a basis of checkpoint bbbb", script, **keywords)
    save_basis(fit_basis(random_map().reshape(-1, 6)), "a" * 64, basis)
    assert make_page(**keywords).exists()


@pytest.mark.parametrize("script", [make_page, draw])
def test_fewer_than_three_dimensions_are_refused(tmp_path, script):
    path = save_map(tmp_path, random_map((*SHAPE, 2)))
    refused("found 2 dimensions, wanted 3 or more", script, representation_path=path)


def test_the_page_of_an_earlier_map_is_removed(representations):
    page = make_page(representation_path=representations)
    maps.remove_products(page.parent)
    assert not page.exists()


# ---- odd arrays ----------------------------------------------------------------------------------

ODD_MAPS = {
    "text classes": ("classification_map", np.full(SHAPE, "a"), "found <U1, wanted integers"),
    "classes NaN": ("classification_map", np.full(SHAPE, math.nan), "found float64, wanted int"),
    "classes to 256": ("classification_map", np.full(SHAPE, 256), "found codes 256 to 256"),
    "durations": ("classification_map", np.zeros(SHAPE, "m8[s]"), "found timedelta64"),
    "text confidence": ("confidence", np.full(SHAPE, "a"), "found <U1, wanted floating-point"),
    "dates": ("confidence", np.zeros(SHAPE, "M8[s]"), "found datetime64"),
    "complex confidence": ("confidence", np.zeros(SHAPE, complex), "found complex128"),
    "counts below 0": (
        "valid_count",
        np.full(SHAPE, -1),
        "found codes -1 to -1, wanted 0 to 65535",
    ),
    "text counts": ("valid_count", np.full(SHAPE, "a"), "found <U1, wanted integers"),
}


@pytest.mark.parametrize("case", ODD_MAPS)
def test_an_odd_map_beside_the_representations_is_refused(representations, case):
    name, array, message = ODD_MAPS[case]
    np.save(representations.parent / f"{name}.npy", array)
    refused(f"{name}.npy: {message}", make_page, representation_path=representations)
    assert "explore.html" not in os.listdir(representations.parent)


@pytest.mark.parametrize("kind", ["U1", complex, int])
def test_scales_that_are_no_floating_point_numbers_are_refused(representations, kind):
    scales = np.ones(SHAPE, kind)
    np.save(representations, np.ones((*SHAPE, 6), np.int8))
    np.save(maps.scales_path(representations), scales)
    for script in (make_page, draw, train_head):
        refused(
            f"_scales.npy: found {scales.dtype}, wanted floating-point numbers",
            script,
            representation_path=representations,
        )


@pytest.mark.parametrize("script", [make_page, draw])
def test_values_that_cannot_be_squared_are_refused(tmp_path, script):
    path = save_map(tmp_path, np.sign(random_map((*SHAPE, 6))) * 3e38)
    refused(r"found values up to 3e\+38, wanted at most 1e\+12", script, representation_path=path)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (np.full(SHAPE, "a"), "splits.npy: found <U1, wanted integers"),
        (np.full(SHAPE, 7), "splits.npy: found codes 7 to 7, wanted 0 to 3"),
        (np.full(SHAPE, -1), "splits.npy: found codes -1 to -1, wanted 0 to 3"),
    ],
)
def test_odd_splits_are_refused(representations, splits, message):
    np.save(representations.parent / "splits.npy", splits)
    splits_path = representations.parent / "splits.npy"
    refused(message, train_head, representations, splits_path=splits_path)


def test_a_head_whose_loss_is_not_finite_ends(representations):
    with pytest.raises(FloatingPointError, match="in epoch [12], wanted a lower learning_rate"):
        train_head(representations, learning_rate=1e30, epochs=2, batch_size=32)
    assert not (representations.parent / "maddy/metrics.json").exists()


# ---- numbers too large ---------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["batch_size", "epochs", "val_pixels", "sample_pixels"])
@pytest.mark.parametrize("number", [2**63, 10**30, 10**309, 10**400])
def test_whole_numbers_too_large_are_refused(key, number):
    refused(f"^{key}=1?.*: wanted . to {2**63 - 1}$", runtime.check, {key: number})
    assert runtime.check({key: 2**63 - 1})[key] == 2**63 - 1


def test_numbers_that_are_not_finite_or_too_small_are_refused_as_before():
    refused("batch_size=0: wanted 2 or more", runtime.check, {"batch_size": 0})
    for rate in (math.inf, math.nan, -1.0):
        refused(f"learning_rate={rate}: wanted 0 or", runtime.check, {"learning_rate": rate})


@pytest.mark.parametrize(
    "transform",
    [
        [10, 0, 10**400, 0, -10, 0],
        [10**400, 0, 0, 0, -10, 0],
        [10, 0, 1e10, 0, -10, 0],
        [10, 0, 0, 0, -10, -1e300],
        [1e-10, 0, 0, 0, -10, 0],
        [10, 0, 0, 0, -1e8, 0],
        [math.nan, 0, 0, 0, -10, 0],
        [10, 10, 0, 10, 10, 0],
    ],
)
def test_transforms_that_overflow_are_refused(tmp_path, transform):
    path = tmp_path / "tile.json"
    path.write_text(json.dumps({"crs": "EPSG:32631", "transform": transform}))
    refused("tile.json: found transform .*, wanted six numbers", read_tile_json, path)


def test_a_page_smaller_than_the_program_in_it_is_refused(representations):
    """Regression: it advised stride=17, then 18, and so on."""
    keywords = {"representation_path": representations}
    refused("max_mb=1: wanted 4 or more", make_page, max_mb=1, **keywords)
    config = {**explore.run_config, "representation_path": str(representations), "max_mb": 1.0}
    refused("wanted so much$", explore.choose_stride, explore.open_scenes(config), config)


# ---- labels that were asked for ------------------------------------------------------------------


def test_more_labels_than_most_pixels_are_refused(tmp_path):
    keywords = {"label_counts": "20,101", "most_pixels": 100, "checkpoint_path": tmp_path / "a.pt"}
    line = refused("label_counts=20,101: found 101, wanted", run, label_efficiency, **keywords)
    assert "most_pixels=100" in line


def test_all_labels_that_are_cut_are_said(workplace, tmp_path, capsys):
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    keywords |= {"dataset_name": "toy", "output_dir": tmp_path / "out", "seeds": 1}
    runtime.notice.cache_clear()
    run(label_efficiency, label_counts="0", most_pixels=30, models="harmonic", **keywords)
    out = capsys.readouterr().out
    assert out.count("labelled pixels, cut to most_pixels=30 of them") == 2  # training and test
    assert out.count("train: ") == 1


# ---- folders of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_the_folder_of_a_training_is_refused(representations, tmp_path, name):
    training = tmp_path / "training"
    training.mkdir()
    (training / name).write_bytes(b"")
    (training / "metrics.jsonl").write_text("{}\n")
    message = f"training: found {name} of a training, wanted another output_dir"
    refused(message, train_head, representations, output_dir=training)
    refused(message, run, label_efficiency, output_dir=training)
    refused(message, make_page, representation_path=representations, output_dir=training)
    assert sorted(os.listdir(training)) == sorted([name, "metrics.jsonl"])
    assert (training / "metrics.jsonl").read_text() == "{}\n"


def test_two_that_simulate_at_once_make_one_data_set(tmp_path, monkeypatch, capsys):
    """The second comes to an end first; its tiles stay, and nothing else does."""
    small = {"base_path": tmp_path, "size": 16, "num_tiles": 1, "num_dates": 3}
    write_tile, getpid = make_demo_data.write_tile, os.getpid

    def meanwhile(*arguments):
        write_tile(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(make_demo_data, "write_tile", write_tile)
            patch.setattr(os, "getpid", lambda: getpid() + 1)
            run(make_demo_data, **small, seed=1)

    with monkeypatch.context() as patch:
        patch.setattr(make_demo_data, "write_tile", meanwhile)
        folder = run(make_demo_data, **small)
    assert "another process has made it meanwhile" in capsys.readouterr().out
    assert os.listdir(tmp_path / "data") == ["simulated"]
    assert [path.name for path in (folder / "processed").iterdir()] == ["MGRS-SIM1"]
    refused("exists already, wanted a new dataset_name", run, make_demo_data, **small)
