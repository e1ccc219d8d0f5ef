"""From a checkpoint to maps: what they hold, and that nothing but tile and checkpoint matters."""

import json
import signal
import time
from pathlib import Path

from running.device import Runtime
from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import (
    Fork,
    assert_pictures_logged,
    fine_tune,
    make_tile,
    map_tile,
    run,
    run_ranks,
    tile_of,
)
from map_helpers import map_in

import create_false_color_map
import infer
from maps.reader import RepresentationMap
from maps.writer import MapWriter


def test_maps_of_a_tile(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "maps")
    valid = np.load(folder / "valid_count.npy")
    representations = np.load(folder / "representation_map.npy")
    class_map, confidence = (
        np.load(folder / f"{name}.npy") for name in ("classification_map", "confidence")
    )
    assert representations.shape == (24, 16, 16)
    covered = valid >= 5
    assert (np.isfinite(representations).all(-1) == covered).all()
    assert ((class_map > 0) == covered).all()
    assert set(np.unique(class_map[covered])) <= {40, 95}
    assert (np.isfinite(confidence) == covered).all()
    assert 0.5 <= confidence[covered].min() <= confidence[covered].max() <= 1
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_the_first_dimensions_alone(workplace, tmp_path, form):
    """The map is the first part of the whole one, and the classes are those of all dimensions."""
    keys = {"representation_format": form}
    (whole,) = map_tile(workplace, tmp_path / "whole", **keys)
    (cut,) = map_tile(workplace, tmp_path / "cut", dimensions=4, **keys)
    whole_map, cut_map = (
        next(RepresentationMap(folder / "representation_map.npy").blocks())[1]
        for folder in (whole, cut)
    )
    assert cut_map.shape == (24, 16, 4)
    step = np.nanmax(np.abs(whole_map)) / 127 if form == "int8" else 1e-9
    np.testing.assert_allclose(cut_map, whole_map[..., :4], atol=step)
    for name in ("classification_map", "confidence"):
        assert (cut / f"{name}.npy").read_bytes() == (whole / f"{name}.npy").read_bytes()
    with pytest.raises(InputError, match=r"another dimensions \(was 4\)"):
        map_tile(workplace, tmp_path / "cut", **keys)
    info = json.loads((whole / "infer.json").read_text())
    del info["dimensions"]  # a map of an earlier version
    (whole / "infer.json").write_text(json.dumps(info))
    map_tile(workplace, tmp_path / "whole", **keys)
    with pytest.raises(InputError, match="dimensions=17: wanted at most the 16 of .*best.pt"):
        map_tile(workplace, tmp_path / "more", dimensions=17)


def test_too_few_observations_are_no_data(workplace, tmp_path):
    """No data is NaN in the representations, class 0 in the map and white in the picture."""
    tile = make_tile(tmp_path / "MGRS-holes", (20, 24, 16, 10), clear=0.9)
    masks = np.load(tile / "masks.npy")
    masks[:, 12:] = 0
    masks[4:, :, :3] = 0
    np.save(tile / "masks.npy", masks)
    (folder,) = map_tile(workplace, tmp_path / "holes", tile_path=tile)
    missing = masks.sum(0) < 5
    assert missing[12:].all()
    assert (np.load(folder / "classification_map.npy")[missing] == 0).all()
    assert np.isnan(np.load(folder / "representation_map.npy")[missing]).all()
    run(create_false_color_map, representation_path=folder / "representation_map.npy")
    shown = map_in(folder / "false_color.png", missing.shape)
    assert ((shown == 255).all(-1) == missing).all()


def test_a_map_without_a_valid_pixel_is_said(workplace, tmp_path, capsys):
    """Regression: all files were written, empty, and no line said so."""
    tile = make_tile(tmp_path / "MGRS-few", (4, 8, 8, 10), clear=1.0)
    (folder,) = map_tile(workplace, tmp_path / "few", tile_path=tile)
    assert "MGRS-few: found 0% of its pixels with min_valid=5 clear" in capsys.readouterr().out
    assert np.isnan(np.load(folder / "representation_map.npy")).all()


def test_rows_without_a_valid_pixel_come_in_blocks_like_others(workplace, tmp_path, monkeypatch):
    """Regression: they were all added to the next block: 31 GB for half of a full tile."""
    monkeypatch.setattr(Runtime, "block_pixels", 16)  # a row
    written, write = [], MapWriter.write
    monkeypatch.setattr(
        MapWriter, "write", lambda self, rows, maps: written.append(rows) or write(self, rows, maps)
    )
    tile = make_tile(tmp_path / "MGRS-south", (20, 24, 16, 10), clear=1.0)
    masks = np.load(tile / "masks.npy")
    masks[:, :20] = masks[:, 22:] = 0
    np.save(tile / "masks.npy", masks)
    (folder,) = map_tile(workplace, tmp_path / "south", tile_path=tile)
    assert written == [(row, row + 1) for row in range(24)]
    found = np.isfinite(np.load(folder / "representation_map.npy")).all((1, 2))
    assert np.flatnonzero(found).tolist() == [20, 21]


def test_the_same_map_whatever_the_blocks(workplace, tmp_path, monkeypatch):
    """Blocks of rows, batches of series and their padding change nothing but speed."""
    (one,) = map_tile(workplace, tmp_path / "blocks1")
    for name, value in {"block_pixels": 48, "batch_dates": 40, "pad_dates": 8}.items():
        monkeypatch.setattr(Runtime, name, value)
    (other,) = map_tile(workplace, tmp_path / "blocks2")
    np.testing.assert_allclose(
        np.load(one / "representation_map.npy"),
        np.load(other / "representation_map.npy"),
        atol=1e-5,
    )
    (again,) = map_tile(workplace, tmp_path / "blocks3")
    for name in ("representation_map", "classification_map"):
        assert (other / f"{name}.npy").read_bytes() == (again / f"{name}.npy").read_bytes()


@pytest.mark.parametrize("keys", [{"draws": 4}, {"dates": 10}])
def test_all_clear_observations_or_some_of_them(workplace, tmp_path, keys):
    """Maps of a tile with `draws` or other `dates` agree on most pixels."""
    (every,) = map_tile(workplace, tmp_path / "every", dates=0)
    (some,) = map_tile(workplace, tmp_path / "some", **keys)
    a, b = (np.load(folder / "classification_map.npy") for folder in (every, some))
    assert ((a == 0) == (b == 0)).all()
    assert (a == b).mean() > 0.8
    a, b = (np.load(folder / "representation_map.npy") for folder in (every, some))
    assert (a != b).any()


def test_a_pixel_with_few_dates_is_read_whole(workplace, tmp_path):
    (every,) = map_tile(workplace, tmp_path / "every", dates=0)
    (most,) = map_tile(workplace, tmp_path / "most")  # 24 of at most 20
    name = "representation_map.npy"
    assert (every / name).read_bytes() == (most / name).read_bytes()


def test_by_default_the_maps_of_a_tile_lie_in_one_place(workplace, tmp_path, monkeypatch, capsys):
    """Alone or in a folder of tiles, as README's commands expect."""
    monkeypatch.chdir(tmp_path)
    assert map_tile(workplace, "") == [Path("outputs/MGRS-0")]
    folders = map_tile(workplace, "", tile_path=tile_of(workplace).parent)
    assert folders == [Path("outputs/MGRS-0"), Path("outputs/MGRS-1")]
    assert "outputs/MGRS-0: done already" in capsys.readouterr().out


def test_folders_of_tiles_and_tiles_already_done(workplace, tmp_path, capsys):
    folders = map_tile(workplace, tmp_path / "all", tile_path=tile_of(workplace).parent)
    assert [folder.name for folder in folders] == ["MGRS-0", "MGRS-1"]
    before = {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}
    map_tile(workplace, tmp_path / "all", tile_path=tile_of(workplace).parent)
    assert capsys.readouterr().out.count("done already") == 2
    assert before == {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}
    with pytest.raises(InputError, match="made with another representation_format"):
        map_tile(
            workplace,
            tmp_path / "all",
            tile_path=tile_of(workplace).parent,
            representation_format="int8",
        )
    map_tile(workplace, tmp_path / "all", tile_path=tile_of(workplace).parent, overwrite=True)
    assert before != {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}


def test_bad_tiles_are_skipped_when_asked(workplace, tmp_path, capsys):
    for number in (0, 1):
        make_tile(tmp_path / f"tiles/MGRS-{number}", (20, 8, 8, 10 if number else 6))
    with pytest.raises(InputError, match="MGRS-0: found"):
        map_tile(workplace, tmp_path / "bad", tile_path=tmp_path / "tiles")
    (done,) = map_tile(
        workplace, tmp_path / "bad", tile_path=tmp_path / "tiles", skip_bad_tiles=True
    )
    assert done.name == "MGRS-1"
    assert "skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_looks_finished(workplace, tmp_path):
    tile = make_tile(tmp_path / "MGRS-big", (20, 400, 200, 10), labels=False)
    arguments = [f"tile_path={tile}", f"checkpoint_path={workplace / 'classifier/best.pt'}"]
    arguments += [f"output_dir={tmp_path / 'out'}", "device=cpu", "wandb_mode=disabled"]
    process = Fork(*arguments, script=infer)
    while not list((tmp_path / "out").glob(".valid_count*")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    assert not list((tmp_path / "out").glob("[!.]*.npy"))
    assert not (tmp_path / "out/infer.json").exists()
    map_tile(workplace, tmp_path / "killed", tile_path=tile)


@pytest.mark.slow
def test_a_map_in_bf16(workplace, tmp_path):
    """Close to that in float32; infer.json says which it is, and no map is a mixture of both."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no products in bf16")
    folders = {}
    for precision in ("float32", "bfloat16"):
        (folders[precision],) = map_tile(workplace, tmp_path / precision, precision=precision)
        about = json.loads((folders[precision] / "infer.json").read_text())
        assert about["precision"] == precision
    one, other = (np.load(folder / "representation_map.npy") for folder in folders.values())
    kept = np.isfinite(one).all(-1)
    np.testing.assert_array_equal(np.isfinite(other).all(-1), kept)
    one, other = one[kept], other[kept]
    cosine = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert cosine.min() > 0.999
    assert np.abs(one - other).max() > 1e-4
    with pytest.raises(InputError, match=r"made with another precision \(was bfloat16\)"):
        map_tile(workplace, folders["bfloat16"], precision="float32")
    assert map_tile(workplace, folders["bfloat16"], precision="auto")  # done already


def test_torchrun_divides_a_folder_of_tiles(workplace, tmp_path):
    map_tile(workplace, tmp_path / "one", tile_path=tile_of(workplace).parent)
    config = infer.run_config | {
        "checkpoint_path": str(workplace / "classifier/best.pt"),
        "tile_path": str(tile_of(workplace).parent),
        "output_dir": str(tmp_path / "two"),
        "device": "cpu",
        "precision": "float32",
        "wandb_mode": "disabled",
    }
    done = run_ranks(config, script=infer)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        name = f"MGRS-{number}/representation_map.npy"
        np.testing.assert_allclose(
            np.load(tmp_path / "two" / name), np.load(tmp_path / "one" / name), atol=1e-5
        )


def test_mistakes_of_inference(workplace, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((workplace / "classifier/best.pt").read_bytes()[:5000])
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.ones(2)}, foreign)
    pretrained = workplace / "pretrained/best.pt"
    for keywords, message in [
        ({"checkpoint_path": cut}, "cut.pt: found no whole checkpoint"),
        ({"checkpoint_path": foreign}, "of another program"),
        (
            {"checkpoint_path": pretrained, "classify": "true"},
            "found a pretrained checkpoint, wanted a classifier one",
        ),
        ({"tile_path": tmp_path}, "found no tile"),
        ({"output_dir": "/proc/no"}, "not writable"),
    ]:
        standard = {
            "checkpoint_path": workplace / "classifier/best.pt",
            "tile_path": tile_of(workplace),
            "output_dir": tmp_path / "out",
        }
        with pytest.raises(InputError, match=message) as error:
            run(infer, **standard | keywords)
        assert "\n" not in str(error.value)


def test_pictures_are_logged_to_wandb(workplace, tmp_path):
    map_tile(workplace, tmp_path / "out", wandb_mode="offline", wandb_dir=tmp_path / "out")
    assert_pictures_logged(tmp_path / "out")


def test_a_folder_of_a_training_is_refused(workplace, tmp_path):
    """Regression: lines of the map were written to its metrics.jsonl."""
    fine_tune(workplace, tmp_path / "out", epochs=1)
    before = (tmp_path / "out/metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="found last.pt of a training"):
        map_tile(workplace, tmp_path / "out")
    assert (tmp_path / "out/metrics.jsonl").read_bytes() == before
