"""From a place and a year to a land-cover map, as docs/prepare.md has it, on loopback."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

from running.config import override
from running.errors import InputError

import geopandas
import numpy as np
import prepare
import pytest
import rasterio
import shapely
import torch
from helpers import ROOT, make_tile
from rio_cogeo import cog_validate
from scenes import fill
from small_scenes import write_raster
from stac_server import (
    CRS,
    LEFT,
    SIZE,
    TOP,
    Catalogue,
    FileServer,
    make_scene,
    true_classes,
    true_reflectance,
)

import infer
import prepare_tiles
import train
import train_classification
from maps.geotiff import write_representation_tif
from maps.reader import RepresentationMap, open_representations
from preparation import sentinel2
from tiles import Tile

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]
pytestmark.append(pytest.mark.slow)
STRIDE = 3  # of the tiles, so that mapping them takes seconds
WIDTH = SIZE // STRIDE
SCRIPTS = {
    "prepare_tiles.py": prepare_tiles,
    "train.py": train,
    "train_classification.py": train_classification,
    "infer.py": infer,
}
SMALL = {  # what a test changes of the commands, so that they take seconds
    "prepare_tiles.py": [],
    "train.py": [
        "min_valid=4",
        "max_steps=4",
        "width=16",
        "depth=1",
        "latent_dim=8",
        "projector_dim=16",
    ],
    "train_classification.py": ["min_valid=4", "epochs=1", "label_count=600"],
    "infer.py": [],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Twelve dates of two tiles that overlap by 24 pixels."""
    folder = tmp_path_factory.mktemp("world")
    server = FileServer(folder)
    items = [
        make_scene(
            folder,
            server.url,
            f"S2A_{tile}_2021{month:02d}05_0_L2A",
            f"2021-{month:02d}-05",
            shifted=month % 2 == 0,
            tile=tile,
            s2__processing_baseline="04.00",
            earthsearch__boa_offset_applied=month % 2 == 1,
        )
        for month in range(1, 13)
        for tile in ("33UUP", "33UVP")
    ]
    catalogue = Catalogue(folder, items)
    yield SimpleNamespace(server=server, url=catalogue.url)
    catalogue.stop()
    server.shutdown()


def commands(heading="From a place and a year"):
    """The commands of docs/prepare.md under a heading, as lists of words."""
    text = (ROOT / "docs/prepare.md").read_text().split(f"## {heading}")[1]
    block = re.search(r"```bash\n(.*?)```", text, re.S)[1].replace("\\\n", " ")
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def run(script, arguments):
    """Run a script with arguments of the command line, in this process."""
    module = SCRIPTS[script]
    module.main(override(module.run_config, arguments))


def write_fields(path):
    """Polygons of three crops."""
    fields = [
        shapely.box(x, TOP - y - 180, x + 180, TOP - y)
        for y in range(100, 2200, 240)
        for x in range(LEFT["33UUP"] + 200, LEFT["33UVP"] + 2200, 240)
    ]
    crops = [("wheat", "maize", "meadow")[i % 3] for i in range(len(fields))]
    geopandas.GeoDataFrame({"crop": crops}, geometry=fields, crs=CRS).to_file(path)


@pytest.fixture(scope="module")
def mapped(world, tmp_path_factory):
    """All of these commands, run in an empty folder; returns the folder."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mapped")
    write_fields(folder / "fields.gpkg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        for program, script, *arguments in (c for c in commands() if c[0] == "python"):
            assert program == "python"
            if script == "prepare_tiles.py" and "statistics_only=true" not in arguments:
                arguments += [f"stac_url={world.url}", f"stride={STRIDE}"]
            run(script, arguments + SMALL[script])
    return folder


def test_the_commands_of_the_docs_make_tiles_a_model_and_maps(mapped):
    assert len([c for c in commands() if c[0] == "python"]) >= 4
    tiles = sorted((mapped / "data").glob("*/processed/MGRS-*"))
    assert [tile.name for tile in tiles] == ["MGRS-33UUP", "MGRS-33UVP"]
    for folder in tiles:
        tile = Tile(folder)
        assert tile.shape[0] == 12 and (folder / "quick_look.png").exists()
        assert set(np.unique(tile.splits)) == {0, 1, 2, 3}
        names = {entry["name"] for entry in tile.info["classes"].values()}
        assert names == {"wheat", "maize", "meadow"}


def write_own(folder, form):
    """GeoTIFFs of ten bands and SCL on twelve dates: one a date, or one a date and band."""
    for month in range(1, 13):
        day, layers = f"2018-{month:02d}-05", {}
        for band in sentinel2.TESSERA_BANDS:
            layers[band] = true_reflectance(day, band)
        layers["SCL"] = true_classes(day)
        if form == "a file a date":
            stack = [fill(layer) for layer in layers.values()]
            write_raster(folder / f"farm_{day}.tif", *stack, names=[*layers], dtype="int16")
            continue
        for band, layer in layers.items():
            pixel = 10 * SIZE // len(layer)
            transform = rasterio.Affine(pixel, 0, LEFT["33UUP"], 0, -pixel, TOP)
            write_raster(folder / day / f"{band}_{pixel}m.tif", layer, transform=transform)


def test_the_commands_for_own_geotiffs_make_the_same_tile_of_both_forms_and_maps(
    tmp_path, monkeypatch
):
    """The first in a process of its own, as a user starts it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    steps = [c for c in commands("From your own GeoTIFFs") if c[0] == "python"]
    content = {}
    for form in ("a file a date", "a file a band"):
        folder = tmp_path / form
        write_own(folder / "scenes" / "farm", form)
        write_fields(folder / "fields.gpkg")
        command = [sys.executable, ROOT / steps[0][1], *steps[0][2:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (tile,) = (folder / "data/farm_2018/processed").iterdir()
        assert tile.name == "MGRS-farm"
        content[form] = {file.name: file.read_bytes() for file in tile.glob("*.npy")}
    assert content["a file a date"] == content["a file a band"]
    assert len(content["a file a date"]) == 7  # with labels and splits
    monkeypatch.chdir(folder)
    for _, script, *arguments in steps[1:]:
        run(script, arguments + SMALL[script])
    with rasterio.open("outputs/MGRS-farm/classification_map.tif") as source:
        assert str(source.crs) == CRS and set(np.unique(source.read(1))) <= {0, 1, 2, 3}


def test_maps_lie_where_their_source_lies(mapped):
    for name, left in LEFT.items():
        for file in ("classification_map", "confidence", "representation_map"):
            with rasterio.open(mapped / "outputs" / f"MGRS-{name}" / f"{file}.tif") as source:
                wanted = (left, TOP - 10 * SIZE, left + 10 * SIZE, TOP)
                assert tuple(source.bounds) == wanted and str(source.crs) == CRS


def test_a_polygons_label_lies_under_the_polygon(mapped):
    fields = geopandas.read_file(mapped / "fields.gpkg")
    folder = mapped / "data" / "bavaria_2021" / "processed" / "MGRS-33UVP"
    tile = Tile(folder)
    names = {int(code): entry["name"] for code, entry in tile.info["classes"].items()}
    inverse = ~rasterio.Affine(*tile.info["transform"])
    seen = 0
    for crop, place in zip(fields["crop"], fields.representative_point(), strict=True):
        column, row = inverse * (place.x, place.y)
        if 0 <= column < WIDTH and 0 <= row < WIDTH:
            seen += 1
            assert names[tile.labels[int(row), int(column)]] == crop
    assert seen > 50


def test_representations_as_cloud_optimised_geotiff(mapped):
    folder = mapped / "outputs" / "MGRS-33UUP"
    values, scales = open_representations(folder / "representation_map.npy")
    assert values.dtype == np.int8
    for name, wanted, nodata in (
        ("representation_map", np.where(np.isnan(scales)[..., None], -128, values), -128),
        ("representation_map_scales", scales[..., None], np.nan),
    ):
        valid, errors, warnings = cog_validate(folder / f"{name}.tif")
        assert valid and not errors and not warnings
        with rasterio.open(folder / f"{name}.tif") as file:
            np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), wanted)
            assert all(name for name in file.descriptions)
            assert len(set(file.descriptions)) == file.count
            np.testing.assert_equal(file.nodata, nodata)
    assert not list(folder.glob(".*"))


def test_large_maps_have_overviews(tmp_path):
    """More rows than a block, a size that is no multiple of one, float32 with gaps."""
    values = np.random.default_rng(0).normal(size=(700, 530, 3)).astype(np.float32)
    values[100:140, 7] = np.nan
    place = {"crs": CRS, "transform": [10, 0, LEFT["33UUP"], 0, -10, TOP]}
    write_representation_tif(tmp_path, lambda name: values, False, place)
    path = tmp_path / "representation_map.tif"
    valid, errors, warnings = cog_validate(path)
    assert valid and not errors and not warnings
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), values)
        assert np.isnan(file.nodata) and file.overviews(1)
        coarse = np.moveaxis(file.read(out_shape=(3, 350, 265)), 0, -1)
        assert np.isin(coarse[np.isfinite(coarse)], values).all()
    assert sorted(f.name for f in tmp_path.iterdir()) == [path.name]


def test_maps_of_one_call_mosaic_without_a_seam(mapped, tmp_path):
    """A virtual mosaic holds the pixels of its sources, and no gap between them."""
    files = [mapped / "outputs" / f"MGRS-{name}" / "valid_count.tif" for name in LEFT]
    try:
        command = ["gdalbuildvrt", str(tmp_path / "all.vrt"), *map(str, files)]
        subprocess.run(command, check=True, capture_output=True)
        with rasterio.open(tmp_path / "all.vrt") as file:
            mosaic, left = file.read(1), file.bounds.left
    except FileNotFoundError:  # GDAL's programs are not here, its mosaics are
        from rasterio.merge import merge

        merged, transform = merge([str(file) for file in files], method="last")
        mosaic, left = merged[0], transform.c
    east = WIDTH - 24 // STRIDE  # where the second tile begins
    assert mosaic.shape == (WIDTH, east + WIDTH) and left == LEFT["33UUP"]
    sources = [np.load(file.with_suffix(".npy")) for file in files]
    np.testing.assert_array_equal(mosaic[:, east:], sources[1])
    np.testing.assert_array_equal(mosaic[:, :east], sources[0][:, :east])


def test_tessera_eval_reads_our_int8_maps_as_they_are(mapped, monkeypatch, capsys):
    """The Python of docs/prepare.md: polygons, our map and its scales, k-fold without leaks."""
    monkeypatch.chdir(mapped)
    text = (ROOT / "docs" / "prepare.md").read_text()
    seen = {}
    exec(re.search(r"```py\n(.*?)```", text, re.S)[1], seen)
    path = mapped / "outputs/MGRS-33UUP/representation_map.npy"
    wanted = np.concatenate([block for _, block in RepresentationMap(path).blocks()])
    np.testing.assert_array_equal(seen["vectors"], wanted)
    assert "mean_f1" in capsys.readouterr().out and seen["chosen"].sum() > 1000
    labels = Tile(mapped / "data" / "bavaria_2021" / "processed" / "MGRS-33UUP").labels
    np.testing.assert_array_equal(seen["labels"] > 0, np.asarray(labels) > 0)


def test_a_representation_tif_needs_a_place(mapped, tmp_path):
    checkpoint = next(mapped.glob("checkpoints/*/best.pt"))
    info = json.loads(next(mapped.glob("data/*/processed/*/tile.json")).read_text())
    tile = make_tile(tmp_path / "MGRS-0", bands=info["bands"])
    keys = {"checkpoint_path": str(checkpoint), "tile_path": str(tile), "wandb_mode": "disabled"}
    keys |= {"output_dir": str(tmp_path / "out"), "representation_tif": True}
    with pytest.raises(InputError, match="found no crs and transform, wanted both for"):
        infer.main(infer.run_config | keys)


def test_tiles_of_others_train_and_infer(mapped, tmp_path):
    """bands.npy, masks.npy and doys.npy alone, as TESSERA's preprocessing leaves them."""
    source = mapped / "data" / "bavaria_2021" / "processed" / "MGRS-33UUP"
    folder = tmp_path / "data" / "theirs" / "processed" / "MGRS-33UUP"
    folder.mkdir(parents=True)
    for name in ("bands.npy", "masks.npy", "doys.npy"):
        shutil.copy(source / name, folder)
    place = ["statistics_only=true", "dataset_name=theirs", f"base_path={tmp_path}"]
    run("prepare_tiles.py", place)
    quiet = ["wandb_mode=disabled", f"output_dir={tmp_path}/out"]
    run("train.py", [*place[1:], *SMALL["train.py"], *quiet])
    checkpoint = f"checkpoint_path={mapped}/checkpoints/crops/best.pt"
    quiet = ["wandb_mode=disabled", f"output_dir={tmp_path}/map", "representation_format=int8"]
    run("infer.py", [checkpoint, f"tile_path={folder}", *quiet])
    theirs, ours = tmp_path / "map", mapped / "outputs" / "MGRS-33UUP"
    for name in ("representation_map.npy", "representation_map_scales.npy"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()


def test_the_benchmark_of_making_tiles_at_a_tiny_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = {"sizes": "64", "rate_size": 128, "dates": 2, "rounds": 1}
    figures = prepare.main(prepare.run_config | keys)
    assert [row["size"] for row in figures["memory"]] == [64, 128]
    assert all(0.05 < row["peak_gb"] < 4 for row in figures["memory"])
    assert figures["rate"]["copied"] > 0 and figures["rate"]["prepared"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["bench_prepare.json"]
