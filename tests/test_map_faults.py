"""Maps: nothing lost and nothing silent, whatever is killed, full, mixed up or damaged."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rasterio
import torch
from matplotlib.figure import Figure

import create_false_color_map
import infer
import label_efficiency
import make_demo_data
import maps
import read_inference_map
import storage
import train_classification
import train_classification_maddy
from backbones import Classifier, build_backbone
from files import load_checkpoint, save_checkpoint
from reports import score_classes
from runtime import InputError, Runtime, Stopped, check, override
from utils import extract_representations

ROOT = Path(__file__).resolve().parent.parent
BANDS = ["B02", "B03", "B04", "B08"]
GEO = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, -10, 5400000]}
CLASSES = {"40": {"name": "Cropland", "color": "#f096ff"}, "95": {"name": "Mangroves"}}


# ---- helpers -------------------------------------------------------------------------------------


def make_tile(folder, height=24, width=16, seed=0, **info):
    """A georeferenced tile of 12 dates with labels 40 and 95; returns its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shape = (12, height, width, len(BANDS))
    masks = (rng.random(shape[:3]) < 0.7).astype(np.uint8)
    masks[:, :, 0] = 0
    arrays = {
        "bands": rng.integers(1, 5000, shape, np.uint16),
        "masks": masks,
        "doys": np.arange(1, 361, 30, dtype=np.int16),
        "band_mean": np.full(len(BANDS), 2500, np.float32),
        "band_std": np.full(len(BANDS), 1400, np.float32),
        "labels": rng.choice([40, 95], (height, width)).astype(np.uint8),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "tile.json").write_text(json.dumps({"bands": BANDS, **GEO, **info}))
    return folder


def make_checkpoints(folder, seed=0):
    """pretrained.pt and classifier.pt, of weights drawn at random."""
    torch.manual_seed(seed)
    arguments = {"name": "transformer", "num_bands": len(BANDS), "sample_size": 4}
    arguments |= {"latent_dim": 8, "width": 16, "depth": 1}
    backbone = build_backbone(**arguments)
    head = {"head": "linear", "num_classes": 2, "dropout": 0.0}
    classifier = Classifier(backbone, **head)
    content = {
        "config": {"min_valid": 3},
        "backbone": arguments,
        "backbone_state": backbone.state_dict(),
        "bands": BANDS,
        "mean": torch.full((len(BANDS),), 2500.0),
        "std": torch.full((len(BANDS),), 1400.0),
    }
    save_checkpoint(folder / "pretrained.pt", "pretrained", **content)
    content |= {"head": head, "head_state": classifier.head.state_dict(), "classes": CLASSES}
    save_checkpoint(folder / "classifier.pt", "classifier", **content)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tile MGRS-A and two pairs of checkpoints, in . and other/; not to be written to."""
    path = tmp_path_factory.mktemp("place")
    (path / "other").mkdir()
    make_tile(path / "MGRS-A")
    make_checkpoints(path)
    make_checkpoints(path / "other", seed=1)
    return path


def run(script, **keywords):
    config = {**script.run_config, "wandb_mode": "disabled", "device": "cpu"}
    config = {key: value for key, value in config.items() if key in script.run_config}
    assert not set(keywords) - set(config)
    return script.main(
        config | {k: str(v) if isinstance(v, os.PathLike) else v for k, v in keywords.items()}
    )


def map_tile(place, output_dir, checkpoint="classifier", **keywords):
    keywords = {"tile_path": place / "MGRS-A", **keywords}
    checkpoint_path = place / f"{checkpoint}.pt"
    return run(infer, checkpoint_path=checkpoint_path, output_dir=output_dir, **keywords)


def refused(match, function, *arguments, **keywords):
    """The one line of the InputError that is wanted."""
    with pytest.raises(InputError, match=match) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder):
    """{path: content} of all files in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def command(script, **keywords):
    keywords = {"wandb_mode": "disabled", "device": "cpu", **keywords}
    keywords = {key: value for key, value in keywords.items() if value is not None}
    return [sys.executable, str(ROOT / script), *(f"{k}={v}" for k, v in keywords.items())]


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
    map_tile(place, tmp_path / "out", tile_path=tmp_path / "link")
    assert "done already" in capsys.readouterr().out
    (tmp_path / "out/confidence.npy").rename(tmp_path / "confidence.npy")
    map_tile(place, tmp_path / "out", tile_path=tile)
    assert "done already" not in capsys.readouterr().out, "a map of it was missing"
    assert files(tmp_path)["confidence.npy"] == files(tmp_path)["out/confidence.npy"]
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
    with storage.lock_folder(tmp_path / "out"):
        refused("found another run", map_tile, place, tmp_path / "out", overwrite=True)


# ---- 4: no product of an earlier map stays -------------------------------------------------------


def earlier_map(place, folder):
    """A folder with all that a classifier's int8 map, its readers and QGIS leave there."""
    map_tile(place, folder, representation_format="int8")
    run(create_false_color_map, representation_path=folder / "representation_map.npy")
    run(read_inference_map, map_path=folder / "classification_map.npy")
    for name in ("confidence.tif.aux.xml", "false_color.tif.ovr", "classification_map.png.aux.xml"):
        (folder / name).write_text("of QGIS")
    (folder / "notes.txt").write_text("mine")


def test_nothing_of_an_earlier_map_stays(place, tmp_path):
    map_tile(place, tmp_path / "fresh", "pretrained")
    earlier_map(place, tmp_path / "out")
    assert set(maps.PRODUCTS) <= set(files(tmp_path / "out"))
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
    """However far a run came, what lies in the folder is one map, or has no infer.json."""
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
    for product in maps.PRODUCTS:
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


# ---- 6: false colour -----------------------------------------------------------------------------


def test_a_basis_without_npz_is_found_again(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out")
    for _ in range(2):
        run(
            create_false_color_map,
            representation_path=folder / "representation_map.npy",
            basis_path=tmp_path / "basis.v1",
        )
        assert [path.name for path in tmp_path.glob("basis*")] == ["basis.v1.npz"]
    time_of_fit = (tmp_path / "basis.v1.npz").stat().st_mtime_ns
    run(
        create_false_color_map,
        checkpoint_path=place / "classifier.pt",
        tile_path=place / "MGRS-A",
        output_dir=tmp_path / "picture",
        basis_path=tmp_path / "basis.v1",
    )
    assert (tmp_path / "basis.v1.npz").stat().st_mtime_ns == time_of_fit


def test_maps_and_bases_of_other_checkpoints_are_refused(place, tmp_path, capsys):
    paths = []
    for name in ("classifier", "other/classifier"):
        (folder,) = map_tile(place, tmp_path / name, name)
        paths.append(folder / "representation_map.npy")
    basis = tmp_path / "basis.npz"
    run(create_false_color_map, representation_path=paths[0], basis_path=basis)
    keywords = {"representation_path": paths[1], "basis_path": basis}
    refused("basis.npz: found a basis of checkpoint", run, create_false_color_map, **keywords)
    keywords = {"representation_path": f"{paths[0]},{paths[1]}"}
    refused("found a map of checkpoint", run, create_false_color_map, **keywords)
    assert not (tmp_path / "other/classifier/false_color.png").exists()
    capsys.readouterr()
    (tmp_path / "other/classifier/infer.json").unlink()
    run(create_false_color_map, representation_path=paths[1], basis_path=basis)
    assert "not known whether" in capsys.readouterr().out


def test_two_pictures_never_go_to_one_folder(place, tmp_path):
    paths = []
    for year in ("2021", "2022"):
        map_tile(place, tmp_path / year / "MGRS-A")
        paths.append(str(tmp_path / year / "MGRS-A/representation_map.npy"))
    keywords = {"representation_path": ",".join(paths), "output_dir": tmp_path / "out"}
    refused("whose picture goes to", run, create_false_color_map, **keywords)
    assert not (tmp_path / "out").exists()
    assert len(run(create_false_color_map, representation_path=",".join(paths))) == 2


def test_a_picture_does_not_go_beside_maps_of_another_tile_or_checkpoint(
    place, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    map_tile(place, "")
    other = make_tile(tmp_path / "2022/MGRS-A", seed=1)
    for checkpoint, tile, key in [
        ("classifier", other, "tile_path"),
        ("other/classifier", place / "MGRS-A", "checkpoint_sha256"),
    ]:
        keywords = {"checkpoint_path": place / f"{checkpoint}.pt", "tile_path": tile}
        refused(f"found a map with another {key}", run, create_false_color_map, **keywords)
    keywords["checkpoint_path"] = place / "classifier.pt"
    run(create_false_color_map, **keywords)
    assert (tmp_path / "outputs/MGRS-A/false_color.png").exists()


def test_damaged_bases_are_refused(place, tmp_path):
    """A cut-off file, every flipped byte of a small one, absurd sizes, a pickle."""
    (folder,) = map_tile(place, tmp_path / "out")
    basis, keywords = (
        tmp_path / "basis.npz",
        {"representation_path": folder / "representation_map.npy"},
    )
    run(create_false_color_map, basis_path=basis, **keywords)
    whole = basis.read_bytes()
    basis.write_bytes(whole[: len(whole) // 2])
    refused("basis.npz: found no basis", run, create_false_color_map, basis_path=basis, **keywords)
    rng = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(len(whole))])])
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        basis.write_bytes(damaged)
        try:
            maps.load_basis(basis, 8)
        except InputError as error:
            assert "\n" not in str(error)
    good = maps.fit_basis(np.random.default_rng(0).normal(size=(50, 8)))
    for name, values in [
        ("mean", np.zeros(9, np.float32)),
        ("low", np.full(3, np.nan, np.float32)),
        ("high", np.zeros(3, np.float64)),
        ("components", np.array([{}])),
    ]:
        np.savez(basis, **good | {name: values})
        refused("basis.npz: found", maps.load_basis, basis, 8)
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + str({"descr": "<f4", "fortran_order": False, "shape": (10**15,)}).encode().ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(basis, "w") as archive:
        archive.writestr("mean.npy", header)
    refused("mean is cut off", maps.load_basis, basis, 8)


# ---- 9: hectares ---------------------------------------------------------------------------------


def test_hectares_follow_the_unit_of_the_crs():
    def hectares(crs, *transform, height=4):
        return maps.row_hectares({"crs": crs, "transform": list(transform)}, height)

    assert hectares("EPSG:32631", 10, 0, 5e5, 0, -10, 54e5) == pytest.approx([0.01] * 4)
    foot = 1200 / 3937  # metres, of the US survey
    wanted = [900 * foot**2 / 1e4] * 4
    assert hectares("EPSG:2263", 30, 0, 1e6, 0, -30, 2e5) == pytest.approx(wanted, rel=1e-9)
    # the whole ellipsoid, in squares of one degree: 510 065 621.724 square kilometres
    globe = hectares("EPSG:4326", 1, 0, -180, 0, -1, 90, height=180)
    assert globe.sum() * 360 == pytest.approx(51_006_562_172.4, rel=1e-10)
    assert globe[0] < 0.01 * globe[89]
    assert globe == pytest.approx(globe[::-1])
    # Mercator stretches both sides by 2 at 60 degrees north (on the sphere)
    mercator = hectares("EPSG:3857", 10, 0, 0, 0, -10, 8399738)
    assert mercator == pytest.approx([0.0025] * 4, rel=0.01)
    # a local grid, and a rotated one in degrees: pixels are counted
    assert hectares('LOCAL_CS["site",UNIT["metre",1]]', 1, 0, 0, 0, -1, 0) is None
    assert hectares("EPSG:4326", 1, 0.1, 0, 0.1, -1, 0) is None
    assert maps.row_hectares({}, 4) is None


def test_hectares_of_a_map_in_degrees(place, tmp_path, capsys):
    info = {"crs": "EPSG:4326", "transform": [1e-4, 0, 3, 0, -1e-4, 51]}
    tile = make_tile(tmp_path / "MGRS-degrees", **info)
    (folder,) = map_tile(place, tmp_path / "out", tile_path=tile)
    areas = run(read_inference_map, map_path=folder / "classification_map.npy")["areas"]
    # 11.13 m from south to north, and at 51 degrees 7.02 m from west to east
    for row in areas.values():
        assert row["hectares"] / row["pixels"] == pytest.approx(0.00781, rel=0.005)
    assert " ha" in capsys.readouterr().out


# ---- 10: legends ---------------------------------------------------------------------------------


def test_classes_of_all_tiles_are_merged():
    wheat, maize = {"name": "Wheat", "color": "#aa0000"}, {"name": "Maize", "color": "#00aa00"}
    sources = [
        ("A/tile.json", {"classes": {"1": wheat}}),
        ("B/tile.json", {"classes": {"2": maize}}),
    ]
    assert maps.merge_classes(sources) == {"1": wheat, "2": maize}
    sources.append(("C/tile.json", {"classes": {"2": {"name": "Soy"}}}))
    line = refused("class 2", maps.merge_classes, sources)
    assert "B/tile.json" in line
    assert "C/tile.json" in line


def test_another_colour_is_said_and_the_first_is_used(capsys):
    sources = [
        (name, {"classes": {"1": {"name": "Wheat", "color": color}}})
        for name, color in (("A/tile.json", "#aa0000"), ("B/tile.json", "#bb0000"))
    ]
    assert maps.merge_classes(sources)["1"]["color"] == "#aa0000"
    (line,) = capsys.readouterr().out.splitlines()
    assert "A/tile.json" in line
    assert "B/tile.json" in line


def test_fine_tuning_reads_the_classes_of_all_tiles(tmp_path):
    names = {"40": {"name": "Wheat"}, "95": {"name": "Maize"}}
    make_tile(tmp_path / "data/two/processed/MGRS-A", classes={"40": names["40"]})
    make_tile(tmp_path / "data/two/processed/MGRS-B", seed=1, classes={"95": names["95"]})
    keywords = {
        "base_path": tmp_path,
        "dataset_name": "two",
        "backbone": "mlp",
        "block_size": 4,
        "epochs": 1,
        "min_valid": 3,
    }
    scores = run(train_classification, output_dir=tmp_path / "out", **keywords)
    assert {code: row["name"] for code, row in scores["classes"].items()} == {
        "40": "Wheat",
        "95": "Maize",
    }


def test_more_than_twenty_made_up_colours_differ():
    colors = [entry["color"] for entry in maps.class_legend(range(1, 256), {"0": {}}).values()]
    assert len(set(colors)) == 255


def test_the_simple_loop_takes_labels_and_names_from_where_the_map_was_made(place, tmp_path):
    tile = make_tile(tmp_path / "MGRS-named", classes={"40": {"name": "Wheat"}})
    (folder,) = map_tile(place, tmp_path / "named", tile_path=tile)
    path = folder / "representation_map.npy"
    scores = run(train_classification_maddy, representation_path=path, epochs=1)
    assert scores["classes"]["40"]["name"] == "Wheat", "of the tile that infer.json names"
    assert scores["classes"]["95"]["name"] == "class 95"
    shutil.copy(tile / "labels.npy", tmp_path / "labels.npy")
    keywords = {"labels_path": tmp_path / "labels.npy", "epochs": 1}
    scores = run(train_classification_maddy, representation_path=path, **keywords)
    assert scores["classes"]["40"]["name"] == "Cropland", "of infer.json"
    (tile / "labels.npy").unlink()
    refused("labels_path=", run, train_classification_maddy, representation_path=path)


def test_a_map_and_labels_that_mean_something_else_are_said(place, tmp_path, capsys):
    tile = make_tile(tmp_path / "MGRS-named", classes={"40": {"name": "Wheat"}})
    (folder,) = map_tile(place, tmp_path / "named", tile_path=tile)
    capsys.readouterr()
    run(read_inference_map, map_path=folder / "classification_map.npy")
    out = capsys.readouterr().out
    assert "found name 'Wheat' for class 40, wanted 'Cropland'" in out
    np.save(tile / "masks.npy", np.load(tile / "masks.npy"))
    run(read_inference_map, map_path=folder / "classification_map.npy")
    assert "has changed since it was mapped" in capsys.readouterr().out


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
    done = subprocess.run(
        command("infer.py", output_dir=small_disk / "out", **arguments),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: {small_disk}/out/.")
    assert "disk full" in line
    assert "bytes are missing" in line
    assert not files(small_disk)


def test_a_full_disk_ends_the_simulation(tmp_path, small_disk):
    done = subprocess.run(
        command("make_demo_data.py", base_path=small_disk, size=128, device=None, wandb_mode=None),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "bytes are missing" in done.stderr
    assert "bands.npy" in done.stderr
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


def test_space_is_reserved(tmp_path):
    array = storage.create_npy(tmp_path / "map.npy", np.float32, (1000, 300))
    assert (tmp_path / "map.npy").stat().st_blocks * 512 >= array.nbytes
    assert not array.any()
    np.save(tmp_path / "same.npy", np.zeros((1000, 300), np.float32))
    assert (tmp_path / "map.npy").read_bytes() == (tmp_path / "same.npy").read_bytes()


# ---- 16 and 25: stopped, killed and gone on with -------------------------------------------------


def test_a_stopped_run_keeps_what_it_goes_on_with(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Runtime, "block_pixels", 64)  # four rows
    stop = infer.stop_on_signals()
    monkeypatch.setattr(infer, "stop_on_signals", lambda: stop)
    walked = []

    def walk(*arguments, **keywords):
        for block in extract_representations(*arguments, **keywords):
            walked.append(block[0])
            if len(walked) == 3:
                stop.status = 143
            yield block

    monkeypatch.setattr(infer, "extract_representations", walk)
    with pytest.raises(Stopped, match="MGRS-A behind row 12 of 24") as stopped:
        map_tile(place, tmp_path / "out")
    assert stopped.value.status == 143
    assert all(name.startswith(".") and ".part." in name for name in files(tmp_path / "out"))
    stop.status = 0
    map_tile(place, tmp_path / "out")
    assert walked == [(row, row + 4) for row in range(0, 24, 4)]
    assert "goes on behind row 12 of 24" in capsys.readouterr().out
    map_tile(place, tmp_path / "undisturbed")
    assert files(tmp_path / "out").keys() == files(tmp_path / "undisturbed").keys()
    for name, content in files(tmp_path / "undisturbed").items():
        assert files(tmp_path / "out")[name] == content, name


@pytest.mark.parametrize(
    "change", ["checkpoint", "tile", "format", "blocks", "cut part", "damaged progress"]
)
def test_what_was_made_from_something_else_is_not_gone_on_with(
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
        (out / storage.PROGRESS).write_text('{"rows": 12')
    map_tile(place, out, **keywords)
    map_tile(place, tmp_path / "fresh", **keywords)
    for name, content in files(tmp_path / "fresh").items():
        assert files(out)[name] == content, name


def test_killed_at_random_moments_it_makes_the_same_maps(place, tmp_path, monkeypatch):
    """At least 20 kills, then the run that ends; every byte as if none had come."""
    monkeypatch.setattr(Runtime, "block_pixels", 100)
    tile = make_tile(tmp_path / "MGRS-long", 600, 50)
    map_tile(place, tmp_path / "undisturbed", tile_path=tile)
    rng, fork, kills, rows = random.Random(0), multiprocessing.get_context("fork"), 0, 0
    arguments = {"place": place, "output_dir": tmp_path / "out", "tile_path": tile}
    for _ in range(400):
        process = fork.Process(target=map_tile, kwargs=arguments)
        process.start()
        process.join(rng.uniform(0.05, 0.4) if kills < 20 else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            progress = tmp_path / "out" / storage.PROGRESS
            if progress.exists():
                now = json.loads(progress.read_text())["rows"]
                assert now >= rows, "a run went back"
                rows = now
        elif (tmp_path / "out/infer.json").exists():
            assert process.exitcode == 0
            if kills >= 20:
                break
            shutil.rmtree(tmp_path / "out")  # done before it was killed often enough
            rows = 0
    print(f"{kills} kills")
    assert kills >= 20
    wanted, found = files(tmp_path / "undisturbed"), files(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, content in wanted.items():
        assert found[name] == content, name


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_script_with_their_status(place, tmp_path, number, status):
    tile, out = make_tile(tmp_path / "MGRS-long", 2000, 100), tmp_path / "out"
    arguments = {"checkpoint_path": place / "classifier.pt", "tile_path": tile, "output_dir": out}
    process = subprocess.Popen(command("infer.py", **arguments), stdout=subprocess.PIPE, text=True)
    while not (out / storage.PROGRESS).exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    printed = process.communicate()[0]
    assert process.returncode == status
    assert "the same command goes on" in printed
    assert not (out / "infer.json").exists()
    assert len(list(out.glob(".*.part.npy"))) == 4


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
    refused("no_bands.pt: found no usable bands", run, create_false_color_map, **keywords)


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


# ---- resources -----------------------------------------------------------------------------------


def peak_bytes(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def large_map(path, size=6000):
    """A class map on the disk; returns its path."""
    array = storage.create_npy(path, np.uint8, (size, size))
    array[:, : size // 2] = 40
    array[-1, -1] = 95
    return path


def test_a_large_class_map_is_drawn_in_little_memory(tmp_path):
    class_map = maps.read_map(large_map(tmp_path / "map.npy"))
    legend = maps.class_legend([40, 95], {})
    figure = Figure()
    assert peak_bytes(maps.draw_class_map, figure, class_map, legend) < 8 * class_map.size
    (image,) = figure.axes[0].images
    assert max(image.get_size()) <= maps.PICTURE_PIXELS
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["40 Cropland", "95 Mangroves", "no data"], "the single pixel of 95 too"


def test_large_maps_are_read_in_blocks(tmp_path, monkeypatch):
    """Areas and agreement need memory for a block of rows, not for the map."""
    monkeypatch.setattr(maps, "BLOCK_PIXELS", 1 << 18)
    path = large_map(tmp_path / "map.npy")
    large_map(tmp_path / "labels.npy")
    config = {"labels_path": str(tmp_path / "labels.npy")}
    assert peak_bytes(read_inference_map.read_both, path, config) < 20 * (1 << 18) + (1 << 24)
    legend = maps.class_legend([40, 95], {})
    assert peak_bytes(maps.class_areas, maps.read_map(path), legend, GEO) < 36_000_000
    rgba = storage.create_npy(tmp_path / "rgba.npy", np.uint8, (3000, 2000, 4))
    rgba[1000:2100, 300:] = (1, 2, 3, 255)
    assert peak_bytes(maps.write_geotiff, tmp_path / "a.tif", rgba, GEO, None) < rgba.nbytes / 4
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), rgba)


def test_counted_pairs_score_as_single_pixels_do():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([1, 2, 3, 7], 500), rng.choice([1, 2, 3], 500)
    legend = maps.class_legend([1, 2, 3, 5, 7], {})
    pairs = np.zeros((256, 256), int)
    np.add.at(pairs, (labels, predicted), 1)
    rows, columns = np.nonzero(pairs)
    counted = score_classes(rows, columns, legend, pairs[rows, columns])
    single = score_classes(labels, predicted, legend)
    assert counted["confusion_matrix"] == single["confusion_matrix"]
    for key in ("overall_accuracy", "macro_f1", "weighted_f1"):
        assert counted[key] == pytest.approx(single[key], rel=1e-12)
    for code, row in single["per_class"].items():
        assert counted["per_class"][code] == pytest.approx(row)


def test_an_agreement_of_earlier_labels_goes(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out")
    path = folder / "classification_map.npy"
    run(read_inference_map, map_path=path)
    assert plt.imread(folder / "agreement.png").any()
    (folder / "infer.json").unlink()
    run(read_inference_map, map_path=path)
    assert not (folder / "agreement.png").exists()
