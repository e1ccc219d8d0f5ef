"""Maps: nothing lost and nothing silent, whatever is stopped, killed or mixed up."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

from running.config import check, override
from running.device import Runtime
from running.errors import Stopped
from running.files import lock_folder

import numpy as np
import pytest
import torch
from helpers import Fork, kill_again_and_again
from map_helpers import (
    CLASSES,
    as_words,
    files,
    make_place,
    make_tile,
    map_tile,
    refused,
    run,
)

import create_false_color_map
import infer
import label_efficiency
import make_demo_data
import read_inference_map
import train_classification
import train_classification_maddy
from maps.products import product_files
from maps.writer import PROGRESS, MapWriter


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


# ---- 1: another tile is never "done already" -----------------------------------------------------


def test_a_tile_of_the_same_name_is_not_done_already(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = make_tile(tmp_path / "2022/MGRS-A", seed=1)
    (folder,) = map_tile(place, "")
    assert folder == Path("outputs/MGRS-A")
    before = files(folder)
    line = refused("another tile_path .*overwrite=true", map_tile, place, "", tile_path=other)
    assert str(place / "MGRS-A") in line
    refused("another tile_path", map_tile, place, "", tile_path=other, skip_bad_tiles=True)
    assert files(folder) == before
    map_tile(place, "", tile_path=other, overwrite=True)
    info = json.loads((folder / "infer.json").read_text())
    assert info["tile_path"] == str(other)
    assert files(folder)["representation_map.npy"] != before["representation_map.npy"]


def test_a_tile_that_changed_is_not_done_already(place, tmp_path, capsys):
    tile = tmp_path / "MGRS-A"
    shutil.copytree(place / "MGRS-A", tile)
    map_tile(place, tmp_path / "out", tile_path=tile)
    (tmp_path / "link").symlink_to(tile)
    np.save(tile / "labels.npy", np.load(tile / "labels.npy"))  # maps do not depend on labels
    info = json.loads((tile / "tile.json").read_text())
    (tile / "tile.json").write_text(json.dumps(info | {"classes": CLASSES}))  # that came later
    map_tile(place, tmp_path / "out", tile_path=tmp_path / "link")
    assert "done already" in capsys.readouterr().out
    (tmp_path / "out/confidence.npy").rename(tmp_path / "confidence.npy")
    map_tile(place, tmp_path / "out", tile_path=tile)
    assert "done already" not in capsys.readouterr().out, "a map of it was missing"
    assert files(tmp_path)["confidence.npy"] == files(tmp_path)["out/confidence.npy"]
    (tile / "tile.json").write_text(json.dumps(info | {"transform": [10, 0, 0, 0, -10, 0]}))
    refused("another transform", map_tile, place, tmp_path / "out", tile_path=tile)
    masks = np.load(tile / "masks.npy")
    masks[0] = 0
    np.save(tile / "masks.npy", masks)
    refused("another tile_files", map_tile, place, tmp_path / "out", tile_path=tile)


def test_two_tiles_that_go_to_one_folder_are_refused_before_anything_is_mapped(place, tmp_path):
    for year in ("2021", "2022"):
        make_tile(tmp_path / year / "MGRS-same")
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / f"links/MGRS-{year}").symlink_to(tmp_path / year / "MGRS-same")
    for skip in (False, True):
        line = refused(
            "found .* that goes to",
            map_tile,
            place,
            tmp_path / "out",
            tile_path=tmp_path / "links",
            skip_bad_tiles=skip,
        )
        assert "MGRS-2021" in line
        assert "MGRS-2022" in line
    assert not (tmp_path / "out").exists()


def test_another_run_that_maps_into_the_folder_is_noticed(place, tmp_path):
    map_tile(place, tmp_path / "out")
    with lock_folder(tmp_path / "out"):
        refused("found another run", map_tile, place, tmp_path / "out", overwrite=True)


# ---- 4: no product of an earlier map stays -------------------------------------------------------


def earlier_map(place, folder):
    """A folder with all that a classifier's int8 map, its readers and QGIS leave there."""
    map_tile(place, folder, representation_format="int8", representation_tif=True)
    run(create_false_color_map, representation_path=folder / "representation_map.npy")
    run(read_inference_map, map_path=folder / "classification_map.npy")
    (folder / "explore.html").write_text("of explore.py")
    (folder / "item.json").write_text("of a tile with dates")
    for name in ("confidence.tif.aux.xml", "false_color.tif.ovr", "classification_map.png.aux.xml"):
        (folder / name).write_text("of QGIS")
    for ending in ("npy", "tif"):  # a classifier maps no quantity
        (folder / f"regression_map.{ending}").write_text("of a quantity")
    for name in product_files():  # in other formats
        if name.endswith((".png", ".pdf", ".svg")):
            (folder / name).write_text("a picture")
    (folder / "notes.txt").write_text("mine")


def test_nothing_of_an_earlier_map_stays(place, tmp_path):
    map_tile(place, tmp_path / "fresh", "pretrained")
    earlier_map(place, tmp_path / "out")
    assert set(product_files()) <= set(files(tmp_path / "out"))
    refused(
        "another representation_format .*classify", map_tile, place, tmp_path / "out", "pretrained"
    )
    map_tile(place, tmp_path / "out", "pretrained", overwrite=True)
    found, wanted = files(tmp_path / "out"), files(tmp_path / "fresh")
    assert found.pop("notes.txt") == b"mine"
    assert found.keys() - {"metrics.jsonl"} == wanted.keys() - {"metrics.jsonl"}
    refused(
        "found no such file",
        run,
        read_inference_map,
        map_path=tmp_path / "out/classification_map.npy",
    )


@pytest.mark.parametrize("name", ["remove_products", "write_pictures", "read", "publish"])
def test_a_kill_between_two_maps_leaves_no_mix(place, tmp_path, monkeypatch, name):
    """Wherever a run is killed, the folder holds one map, or no infer.json."""
    folder = tmp_path / "out"
    earlier_map(place, folder)
    owner = infer.MapWriter if name in ("read", "publish") else infer
    original = getattr(owner, name)

    def killed(*arguments, **keywords):
        original(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, killed)
        map_tile(place, folder, "other/classifier", overwrite=True)
    assert not (folder / "infer.json").exists()
    assert not (folder / "representation_map_scales.npy").exists()
    map_tile(place, folder, "other/classifier")
    map_tile(place, tmp_path / "fresh", "other/classifier")
    found, wanted = files(folder), files(tmp_path / "fresh")
    for product in product_files():
        assert found.get(product) == wanted.get(product), product
    assert not list(folder.glob(".*"))


def test_the_old_map_stays_whole_while_the_new_one_is_made(place, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    earlier_map(place, folder)
    before = files(folder)
    monkeypatch.setattr(infer.MapWriter, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        map_tile(place, folder, "other/classifier", overwrite=True)
    after = files(folder)
    assert {name: after.get(name) for name in before} == before


# ---- 16 and 25: stopped, killed and gone on with -------------------------------------------------


def test_a_stopped_run_is_resumed(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Runtime, "block_pixels", 64)  # four rows
    stop = infer.stop_on_signals()
    monkeypatch.setattr(infer, "stop_on_signals", lambda: stop)
    written, write = [], infer.MapWriter.write

    def write_and_stop(writer, rows, blocks):
        write(writer, rows, blocks)
        written.append(rows)
        if len(written) == 3:
            stop.status = 143

    monkeypatch.setattr(infer.MapWriter, "write", write_and_stop)
    with pytest.raises(Stopped, match="MGRS-A after row 12 of 24") as stopped:
        map_tile(place, tmp_path / "out")
    assert stopped.value.status == 143
    assert all(name.startswith(".") and ".part." in name for name in files(tmp_path / "out"))
    stop.status = 0
    map_tile(place, tmp_path / "out")
    assert written == [(row, row + 4) for row in range(0, 24, 4)]
    assert "resumes after row 12 of 24" in capsys.readouterr().out
    map_tile(place, tmp_path / "undisturbed")
    assert files(tmp_path / "out").keys() == files(tmp_path / "undisturbed").keys()
    for name, content in files(tmp_path / "undisturbed").items():
        assert files(tmp_path / "out")[name] == content, name


@pytest.mark.parametrize(
    "change",
    ["checkpoint", "tile", "format", "blocks", "processor", "cut part", "damaged progress"],
)
def test_a_map_that_was_made_from_something_else_is_not_resumed(
    place, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(Runtime, "block_pixels", 64)
    tile, out = tmp_path / "MGRS-A", tmp_path / "out"
    shutil.copytree(place / "MGRS-A", tile)
    keywords, fast_in_bf16 = {"tile_path": tile}, "running.device._cpu_is_fast_in_bf16"
    if change == "processor":
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("this CPU has no products in bf16")
        monkeypatch.setattr(fast_in_bf16, lambda: False)
        keywords["precision"] = "auto"
    with monkeypatch.context() as patch:
        patch.setattr(infer, "raise_if_stopped", lambda _, where: 1 / ("row 12" not in where))
        with pytest.raises(ZeroDivisionError):
            map_tile(place, out, **keywords)
    if change == "checkpoint":
        keywords["checkpoint"] = "other/classifier"
    elif change == "tile":
        np.save(tile / "bands.npy", np.load(tile / "bands.npy")[::-1].copy())
    elif change == "format":
        keywords["representation_format"] = "float16"
    elif change == "blocks":
        monkeypatch.setattr(Runtime, "block_pixels", 32)
    elif change == "processor":
        monkeypatch.setattr(fast_in_bf16, lambda: True)
    elif change == "cut part":
        os.truncate(out / ".confidence.part.npy", 200)
    else:
        (out / PROGRESS).write_text('{"rows": 12')
    map_tile(place, out, **keywords)
    map_tile(place, tmp_path / "fresh", **keywords)
    for name, content in files(tmp_path / "fresh").items():
        assert files(out)[name] == content, name


@pytest.mark.slow
def test_killed_at_random_moments_it_makes_the_same_maps(place, tmp_path, monkeypatch):
    """20 kills within 20 * (4 + 2) of 150 blocks, then the end: every byte as if none had come."""
    monkeypatch.setattr(Runtime, "block_pixels", 100)
    tile = make_tile(tmp_path / "MGRS-long", 300, 50)
    begin = time.monotonic()
    map_tile(place, tmp_path / "undisturbed", tile_path=tile)
    tempo = (time.monotonic() - begin) / 150
    out, rows = tmp_path / "out", [0]

    def is_done():
        if (out / PROGRESS).exists():
            rows.append(json.loads((out / PROGRESS).read_text())["rows"])
            assert rows[-1] >= rows[-2], "a run went back"
        return (out / "infer.json").exists()

    function, a_block = lambda: map_tile(place, out, tile_path=tile), (MapWriter, "write")
    kill_again_and_again(function, a_block, 4, tempo, is_done)
    assert len(set(rows)) > 10, "kills found it at a few places only"
    wanted, found = files(tmp_path / "undisturbed"), files(out)
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_script_with_their_status(place, tmp_path, number, status):
    tile, out = make_tile(tmp_path / "MGRS-long", 2000, 100), tmp_path / "out"
    arguments = {"checkpoint_path": place / "classifier.pt", "tile_path": tile, "output_dir": out}
    process = Fork(*as_words(**arguments), script=infer)
    while not (out / PROGRESS).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate()[0]
    assert process.returncode == status
    assert "the same command resumes" in printed
    assert not (out / "infer.json").exists()
    assert len(list(out.glob(".*.part.npy"))) == 5


# ---- 24, and paths with ~ ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        create_false_color_map,
        read_inference_map,
        train_classification_maddy,
        label_efficiency,
        make_demo_data,
    ],
)
def test_scripts_for_one_process_refuse_torchrun(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE=2: wanted one process", run, script)
    assert not files(tmp_path)


def test_the_wave_is_the_home_folder(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    map_tile(place, "~/out")
    path = "~/out/representation_map.npy"
    run(create_false_color_map, representation_path=path, basis_path="~/basis.npz")
    assert (tmp_path / "basis.npz").exists()
    assert not (tmp_path / "~").exists()
    # train_classification.py reads its checkpoint before it checks the other keys
    config = override(train_classification.run_config, ["checkpoint_path=~/best.pt"])
    assert config["checkpoint_path"] == f"{tmp_path}/best.pt"
    assert check({"representation_path": "~/a,~/b"})["representation_path"] == (
        f"{tmp_path}/a,{tmp_path}/b"
    )
