"""Maps from input that is damaged, odd, or changes while it is read."""

import json
import os
import shutil

from running.device import Runtime

import numpy as np
import pytest
import torch
from map_helpers import (
    BANDS,
    files,
    make_place,
    make_tile,
    map_tile,
    refused,
    run,
)

import infer
import read_inference_map
from trained import encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


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
    load = encoder.load_checkpoint

    def load_and_replace(*arguments):
        content = load(*arguments)
        shutil.copy(place / "other/classifier.pt", tmp_path / "best.pt")
        return content

    monkeypatch.setattr(encoder, "load_checkpoint", load_and_replace)
    keywords = {"checkpoint_path": tmp_path / "best.pt", "tile_path": place / "MGRS-A"}
    refused("best.pt: found that it changed while it was read", run, infer, **keywords)


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
    (wrong / "tile.json").write_text(json.dumps({"bands": [*BANDS[1:], "other"]}))
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
    model = infer.Encoder.load(place / "classifier.pt")
    refused("found 1 bad tiles and no good one", infer.open_tiles, config, model, [])
    refused("found 1 bad tiles and no good one", map_tile, place, tmp_path / "none", **keywords)
    assert not (tmp_path / "none").exists()
