"""Maps: nothing lost and nothing silent, whatever is stopped, killed or mixed up."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Fork, kill_again_and_again
from map_helpers import (
    BANDS,
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
from running.checkpoints import load_checkpoint
from running.config import check, override
from running.device import Runtime
from running.errors import Stopped
from running.files import lock_folder


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
    for name in ("confidence.tif.aux.xml", "false_color.tif.ovr", "classification_map.png.aux.xml"):
        (folder / name).write_text("of QGIS")
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
    "change", ["checkpoint", "tile", "format", "blocks", "cut part", "damaged progress"]
)
def test_a_map_that_was_made_from_something_else_is_not_resumed(
    place, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(Runtime, "block_pixels", 64)
    tile, out = tmp_path / "MGRS-A", tmp_path / "out"
    shutil.copytree(place / "MGRS-A", tile)
    with monkeypatch.context() as patch:
        patch.setattr(infer, "raise_if_stopped", lambda _, where: 1 / ("row 12" not in where))
        with pytest.raises(ZeroDivisionError):
            map_tile(place, out, tile_path=tile)
    keywords = {"tile_path": tile}
    if change == "checkpoint":
        keywords["checkpoint"] = "other/classifier"
    elif change == "tile":
        np.save(tile / "bands.npy", np.load(tile / "bands.npy")[::-1].copy())
    elif change == "format":
        keywords["representation_format"] = "float16"
    elif change == "blocks":
        monkeypatch.setattr(Runtime, "block_pixels", 32)
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
    assert len(list(out.glob(".*.part.npy"))) == 4


# ---- a tile that changes while it is mapped ------------------------------------------------------


def change_while_mapping(tile, name, how):
    """Patch MapWriter.write to change a file of the tile after the first block."""
    write = infer.MapWriter.write

    def write_and_change(writer, rows, blocks):
        write(writer, rows, blocks)
        if rows[0] == 0:
            array = np.load(tile / f"{name}.npy")
            before = (tile / f"{name}.npy").stat()
            if how == "in place":
                np.save(tile / f"{name}.npy", array[::-1])
            elif how == "removed":
                (tile / f"{name}.npy").unlink()
            else:  # "renamed", or with the time of the old one, as an archive is unpacked
                np.save(tile / "new.npy", array[::-1] if name == "bands" else 0 * array)
                if how == "same time":
                    os.utime(tile / "new.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
                (tile / "new.npy").replace(tile / f"{name}.npy")

    return write_and_change


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("bands", "renamed"),
        ("bands", "same time"),
        ("bands", "in place"),
        ("masks", "renamed"),
        ("masks", "removed"),
        ("doys", "removed"),
    ],
)
def test_a_tile_that_changes_while_it_is_mapped_is_refused(place, tmp_path, monkeypatch, name, how):
    """Regression: half of the map was of each tile, or masks without a clear date a traceback."""
    monkeypatch.setattr(Runtime, "block_pixels", 64)
    tile, out = tmp_path / "MGRS-A", tmp_path / "out"
    shutil.copytree(place / "MGRS-A", tile)
    with monkeypatch.context() as patch:
        patch.setattr(infer.MapWriter, "write", change_while_mapping(tile, name, how))
        line = refused(
            "found that it changed while it was read", map_tile, place, out, tile_path=tile
        )
    assert line.startswith(str(tile / f"{name}.npy"))
    assert all(file.startswith(".") or file == "metrics.jsonl" for file in files(out))
    if how == "removed":
        return
    map_tile(place, out, tile_path=tile)
    map_tile(place, tmp_path / "fresh", tile_path=tile)
    for file, content in files(tmp_path / "fresh").items():
        assert files(out)[file] == content, file


def test_a_change_after_the_last_block_or_before_the_first_counts(place, tmp_path, monkeypatch):
    """Files are watched from before the tile is opened until after its last block."""
    tile = tmp_path / "MGRS-A"
    shutil.copytree(place / "MGRS-A", tile)
    for name, owner in (("clear_counts", infer.Tile), ("write", infer.MapWriter)):
        original = getattr(owner, name)

        def changed(*arguments, original=original):
            result = original(*arguments)
            np.save(tile / "masks.npy", np.load(tile / "masks.npy"))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, changed)
            keywords = {"tile_path": tile}
            refused(
                "masks.npy: found that it changed", map_tile, place, tmp_path / name, **keywords
            )
        assert not (tmp_path / name / "infer.json").exists()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(place, tmp_path, monkeypatch):
    """Regression: a training still ran and replaced best.pt: infer.json had another hash."""
    shutil.copy(place / "classifier.pt", tmp_path / "best.pt")
    load = infer.load_checkpoint

    def load_and_replace(*arguments):
        content = load(*arguments)
        shutil.copy(place / "other/classifier.pt", tmp_path / "best.pt")
        return content

    monkeypatch.setattr(infer, "load_checkpoint", load_and_replace)
    keywords = {"checkpoint_path": tmp_path / "best.pt", "tile_path": place / "MGRS-A"}
    refused("best.pt: found that it changed while it was read", run, infer, **keywords)


# ---- 22 and 23: damaged input, and the user's own mistakes ---------------------------------------


def test_damaged_provenance_is_refused(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out")
    whole = json.loads((folder / "infer.json").read_text())
    for text in [
        "{",
        "[]",
        "[" * 100_000,
        *(
            json.dumps(whole | changed)
            for changed in (
                {"crs": None},
                {"transform": [1, 2]},
                {"classes": {"40": 7}},
                {"tile": 3},
                {"tile_path": ["x"]},
                {"checkpoint_sha256": None},
                {"tile_files": 3},
            )
        ),
    ]:
        (folder / "infer.json").write_text(text)
        path = folder / "classification_map.npy"
        refused("infer.json: found", run, read_inference_map, map_path=path)
        refused("infer.json: found", map_tile, place, folder)
    map_tile(place, folder, overwrite=True)
    assert json.loads((folder / "infer.json").read_text()) == whole


def test_a_checkpoint_without_bands_is_refused(place, tmp_path):
    content = torch.load(place / "classifier.pt", weights_only=True)
    del content["bands"]
    torch.save(content, tmp_path / "no_bands.pt")
    keywords = {"checkpoint_path": tmp_path / "no_bands.pt", "tile_path": place / "MGRS-A"}
    refused("no_bands.pt: found no usable bands", run, infer, **keywords)


def test_a_checkpoint_of_nan_is_refused(place, tmp_path):
    """Regression: its maps were empty, and no line said so, or a picture ended in a traceback."""
    for part, kind in (("backbone", "backbone"), ("head", "classifier")):
        content = torch.load(place / "classifier.pt", weights_only=True)
        next(iter(content[f"{part}_state"].values()))[:] = torch.nan
        torch.save(content, tmp_path / "nan.pt")
        keywords = {"checkpoint_path": tmp_path / "nan.pt", "tile_path": place / "MGRS-A"}
        refused(f"{kind} that cannot be built: its weights are not finite", run, infer, **keywords)


def name_classes(*codes, **entry):
    return {code: {"name": "Wheat", **entry} for code in codes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"classes": name_classes("40", "300")},
            "found classes {'40': .* wanted 2: codes 1 to 255",
        ),
        ({"classes": name_classes("40", "abc")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("0", "40")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "-1")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "040")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes(40, 95)}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "\u0664")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "95", color="no\ncolour")}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "95", color=7)}, "wanted 2: codes 1 to 255"),
        ({"classes": name_classes("40", "95", name=7)}, "wanted 2: codes 1 to 255"),
        ({"classes": [40, 95]}, "wanted 2: codes 1 to 255"),
        ({"classes": None}, "wanted 2: codes 1 to 255"),
        ({"min_valid": "ten"}, "found no usable config in the checkpoint"),
        ({"min_valid": 2.5}, "found no usable config in the checkpoint"),
        ({"min_valid": 0}, "found min_valid 0, wanted 1 to 65535"),
        ({"min_valid": 1 << 20}, "found min_valid 1048576, wanted 1 to 65535"),
        ({"mean": torch.ones(3)}, r"of \[3, 4\] bands, wanted 4 as its backbone"),
        (
            {"bands": ["B02"], "mean": torch.ones(1), "std": torch.ones(1)},
            r"of \[1\] bands, wanted 4",
        ),
    ],
)
def test_a_checkpoint_with_an_odd_header_is_refused(place, tmp_path, content, message):
    """Regression: tracebacks, codes that overflow, and a class with the code of "no data"."""
    checkpoint = torch.load(place / "classifier.pt", weights_only=True)
    if "min_valid" in content:
        checkpoint["config"] |= content
    else:
        checkpoint |= content
    torch.save(checkpoint, tmp_path / "odd.pt")
    keywords = {"checkpoint_path": tmp_path / "odd.pt", "tile_path": place / "MGRS-A"}
    line = refused(message, run, infer, **keywords)
    assert line.startswith(str(tmp_path / "odd.pt"))
    if "classes" in content:  # which have no part in its representations
        output_dir = tmp_path / "representations"
        assert run(infer, classify="false", output_dir=output_dir, **keywords)


def three_tiles(tmp_path):
    """A good tile, one with other bands and one whose masks hold a 2."""
    make_tile(tmp_path / "tiles/MGRS-good")
    wrong = make_tile(tmp_path / "tiles/MGRS-bands")
    (wrong / "tile.json").write_text(json.dumps({"bands": BANDS[::-1]}))
    masks = make_tile(tmp_path / "tiles/MGRS-masks") / "masks.npy"
    np.save(masks, np.load(masks) * 2)
    return tmp_path / "tiles"


def test_bad_tiles_are_found_before_the_first_is_mapped(place, tmp_path, capsys):
    tiles, out = three_tiles(tmp_path), tmp_path / "out"
    (tiles / "MGRS-lost").symlink_to(tmp_path / "nowhere")
    refused("MGRS-bands: found", map_tile, place, out, tile_path=tiles)
    shutil.rmtree(tiles / "MGRS-bands")
    refused("MGRS-lost/bands.npy: found", map_tile, place, out, tile_path=tiles)
    (tiles / "MGRS-lost").unlink()
    refused("MGRS-masks/masks.npy: found value 2", map_tile, place, out, tile_path=tiles)
    assert not out.exists()
    (folder,) = map_tile(place, out, tile_path=tiles, skip_bad_tiles=True)
    assert folder.name == "MGRS-good"
    printed = capsys.readouterr().out
    assert "skipped: " in printed
    assert "1 bad tiles skipped" in printed


def test_the_users_own_mistakes_are_never_skipped(place, tmp_path):
    tiles, out = three_tiles(tmp_path), tmp_path / "out"
    keywords = {"tile_path": tiles, "skip_bad_tiles": True}
    map_tile(place, out, **keywords)
    before = files(out)
    refused("another checkpoint_sha256", map_tile, place, out, "other/classifier", **keywords)
    refused("wandb_mode=on", map_tile, place, tmp_path / "new", wandb_mode="on", **keywords)
    refused("output_dir=/proc/no/MGRS-good: not writable", map_tile, place, "/proc/no", **keywords)
    assert files(out) == before
    shutil.rmtree(tiles / "MGRS-good")
    refused("found 2 bad tiles and no good one", map_tile, place, tmp_path / "none", **keywords)
    shutil.rmtree(tiles / "MGRS-masks")
    # every process of torchrun sees that no tile can be opened
    config = {**infer.run_config, "tile_path": str(tiles), "skip_bad_tiles": True}
    checkpoint = load_checkpoint(place / "classifier.pt")
    refused("found 1 bad tiles and no good one", infer.open_tiles, config, checkpoint, [])
    refused("found 1 bad tiles and no good one", map_tile, place, tmp_path / "none", **keywords)
    assert not (tmp_path / "none").exists()


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
