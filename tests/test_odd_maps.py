"""Maps that do not go together, odd arrays, numbers too large, folders of others: one line each."""

import json
import math
import os

from running.config import check
from running.errors import notice
from running.tile_json import read_tile_json

import numpy as np
import pytest
from browser import make_page, random_map, save_map
from helpers import make_tile, run
from map_helpers import refused

import create_false_color_map
import explore
import label_efficiency
import make_demo_data
import train_classification_maddy
from maps import reader
from maps.false_color import fit_basis, save_basis
from maps.products import remove_products
from maps.reader import scales_path
from preparation import simulated

SHAPE = (20, 30)


@pytest.fixture
def representations(tmp_path):
    """A representation map in out/ with nothing else beside it but infer.json."""
    return save_map(tmp_path / "out", random_map((*SHAPE, 6)), checkpoint_sha256="a" * 64)


def plot(**keywords):
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


@pytest.mark.parametrize("script", [make_page, plot])
def test_maps_of_two_checkpoints_are_refused(representations, tmp_path, script, capsys):
    other = save_map(tmp_path / "b", random_map((*SHAPE, 6)), checkpoint_sha256="b" * 64)
    both = f"{representations},{other}"
    line = refused("found a map of checkpoint bbbbbbbbbbbb", script, representation_path=both)
    assert line.startswith(str(other))
    save_map(tmp_path / "b", random_map((*SHAPE, 6)))
    script(representation_path=both)
    assert f"{other}: not known whether it is of the same checkpoint" in capsys.readouterr().out


def test_a_basis_of_another_checkpoint_is_refused(representations, tmp_path):
    basis = tmp_path / "basis.npz"
    save_basis(fit_basis(random_map().reshape(-1, 6)), {"checkpoint_sha256": "b" * 64}, basis)
    keywords = {"representation_path": representations, "basis_path": basis}
    for script in (make_page, plot):
        refused("basis.npz: found a basis of checkpoint bbbb", script, **keywords)
    save_basis(fit_basis(random_map().reshape(-1, 6)), {"checkpoint_sha256": "a" * 64}, basis)
    assert make_page(**keywords).exists()


@pytest.mark.parametrize(
    "keys",
    [{"dates": 0}, {"draws": 4}, {"representation_format": "int8"}, {"dates": 0, "draws": 1}],
)
def test_maps_of_other_keys_of_infer_are_said(tmp_path, keys, capsys):
    """Regression: maps of another `dates`, `draws` or format of one checkpoint counted as equal."""
    made_by = {"checkpoint_sha256": "a" * 64, "dates": 24, "draws": 0}
    made_by |= {"representation_format": "float32"}
    one = save_map(tmp_path / "a", random_map((*SHAPE, 6)), **made_by)
    same = save_map(tmp_path / "b", random_map((*SHAPE, 6)), **made_by)
    other = save_map(tmp_path / "c", random_map((*SHAPE, 6)), **made_by | keys)
    basis = tmp_path / "basis.npz"
    for script in (plot, make_page):
        script(representation_path=f"{one},{same}", basis_path=basis)
        assert "found a" not in capsys.readouterr().out
        notice.cache_clear()
        script(representation_path=f"{one},{other}")
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "found a map" in line]
        assert line.startswith(f"{other}: found a map of ")
        key = list(keys)[-1]
        assert f"{key}={keys[key]}" in line
        assert f"{key}={made_by[key]} as {one}" in line
        script(representation_path=other, basis_path=basis)
        assert f"{basis}: found a basis of" in capsys.readouterr().out


def test_where_dates_are_averaged_over_draws_their_number_does_not_count(tmp_path, capsys):
    maps = [
        save_map(tmp_path / str(dates), random_map(), checkpoint_sha256="a", draws=4, dates=dates)
        for dates in (24, 0)
    ]
    plot(representation_path=f"{maps[0]},{maps[1]}")
    assert "found a map" not in capsys.readouterr().out


@pytest.mark.parametrize("script", [make_page, plot])
def test_fewer_than_three_dimensions_are_refused(tmp_path, script):
    path = save_map(tmp_path, random_map((*SHAPE, 2)))
    refused("found 2 dimensions, wanted 3 or more", script, representation_path=path)


def test_the_page_of_an_earlier_map_is_removed(representations):
    page = make_page(representation_path=representations)
    remove_products(page.parent)
    assert not page.exists()


# ---- files that change while they are read -------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "out/representation_map.npy",
        "out/infer.json",
        "out/classification_map.npy",
        "MGRS-0/bands.npy",
        "MGRS-0/masks.npy",
        "MGRS-0/labels.npy",
        "MGRS-0/tile.json",
    ],
)
def test_a_page_of_files_that_change_is_not_written(tmp_path, monkeypatch, name):
    """Regression: half of the page was of the old map or tile, half of the new one."""
    tile = make_tile(tmp_path / "MGRS-0", (6, *SHAPE, 4))
    path = save_map(tmp_path / "out", random_map((*SHAPE, 6)), tile_path=str(tile))
    np.save(path.parent / "classification_map.npy", np.ones(SHAPE, np.uint8))
    map_layers = explore.map_layers

    def change_and_read(scene):
        (tmp_path / "new").write_bytes((tmp_path / name).read_bytes())
        (tmp_path / "new").replace(tmp_path / name)
        return map_layers(scene)

    make_page(representation_path=path).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(explore, "map_layers", change_and_read)
        message = f"{name}: found that it changed while it was read, wanted the same"
        refused(message, make_page, representation_path=path)
    assert not (path.parent / "explore.html").exists()
    assert make_page(representation_path=path).exists()


@pytest.mark.parametrize("script", [make_page, plot, train_head])
def test_a_map_that_is_made_anew_while_it_is_read_is_refused(tmp_path, monkeypatch, script):
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4 * 30 * 6 * 5)  # of five rows
    path = save_map(tmp_path / "out", random_map((*SHAPE, 6)))
    opened, blocks = reader.open_representations, []

    def open_and_replace(one):
        arrays = opened(one)
        blocks.append(one)
        if len(blocks) == 3:
            save_map(tmp_path / "new", random_map((*SHAPE, 6), seed=1)).replace(path)
        return arrays

    monkeypatch.setattr(reader, "open_representations", open_and_replace)
    keywords = {} if script is train_head else {"representation_path": path}
    arguments = [path] if script is train_head else []
    refused("representation_map.npy: found that it changed", script, *arguments, **keywords)
    assert {file.name for file in path.parent.iterdir()} <= {path.name, "infer.json", "labels.npy"}


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
    np.save(scales_path(representations), scales)
    for script in (make_page, plot, train_head):
        refused(
            f"_scales.npy: found {scales.dtype}, wanted floating-point numbers",
            script,
            representation_path=representations,
        )


@pytest.mark.parametrize("script", [make_page, plot])
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
    refused(f"^{key}=1?.*: wanted . to {2**63 - 1}$", check, {key: number})
    assert check({key: 2**63 - 1})[key] == 2**63 - 1


def test_numbers_that_are_not_finite_or_too_small_are_refused_as_before():
    refused("batch_size=0: wanted 2 or more", check, {"batch_size": 0})
    for rate in (math.inf, math.nan, -1.0):
        refused(f"learning_rate={rate}: wanted 0 or", check, {"learning_rate": rate})


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
    refused("wanted that much$", explore.choose_stride, explore.open_scenes(config), config)


# ---- labels that were asked for ------------------------------------------------------------------


def test_more_labels_than_most_pixels_are_refused(tmp_path):
    keywords = {"label_counts": "20,101", "most_pixels": 100, "checkpoint_path": tmp_path / "a.pt"}
    line = refused("label_counts=20,101: found 101, wanted", run, label_efficiency, **keywords)
    assert "most_pixels=100" in line


def test_all_labels_that_are_cut_are_said(workplace, tmp_path, capsys):
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    keywords |= {"dataset_name": "toy", "output_dir": tmp_path / "out", "seeds": 1}
    notice.cache_clear()
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
    """The second ends first: its tiles stay, and those of the first are removed."""
    small = {"base_path": tmp_path, "size": 16, "num_tiles": 1, "num_dates": 3}
    write_tile, getpid = simulated.write_tile, os.getpid

    def meanwhile(*arguments):
        write_tile(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(simulated, "write_tile", write_tile)
            patch.setattr(os, "getpid", lambda: getpid() + 1)
            run(make_demo_data, **small, seed=1)

    with monkeypatch.context() as patch:
        patch.setattr(simulated, "write_tile", meanwhile)
        folder = run(make_demo_data, **small)
    assert "another process has made it meanwhile" in capsys.readouterr().out
    assert os.listdir(tmp_path / "data") == ["simulated"]
    assert [path.name for path in (folder / "processed").iterdir()] == ["MGRS-SIM1"]
    refused("exists already, wanted a new dataset_name", run, make_demo_data, **small)
