"""Reading maps: other checkpoints, damaged bases, units, legends, and bounded memory."""

import random
import shutil
import tracemalloc
import zipfile

from running.errors import InputError
from running.files import create_npy
from running.tile_json import merge_classes

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rasterio
from map_helpers import GEO, make_place, make_tile, map_tile, refused, run
from rasterio.warp import transform as reproject

import create_false_color_map
import explore
import read_inference_map
import train_classification
import train_classification_maddy
from evaluation.scores import score_classes
from maps import false_color, pictures, reader
from maps.geotiff import write_geotiff
from maps.land_cover import class_areas, class_legend, row_hectares
from maps.pictures import MAX_SIDE, draw_maps, list_classes, plot_class_map
from maps.reader import read_map


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


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
        explore,
        representation_path=folder / "representation_map.npy",
        output_dir=tmp_path / "page",
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
    refused("found .* that goes to", run, create_false_color_map, **keywords)
    assert not (tmp_path / "out").exists()
    assert len(run(create_false_color_map, representation_path=",".join(paths))) == 2


def test_a_picture_does_not_go_beside_maps_of_another_tile_or_checkpoint(place, tmp_path):
    (folder,) = map_tile(place, tmp_path / "out")
    other = make_tile(tmp_path / "2022/MGRS-A", seed=1)
    for name, checkpoint, tile, key in [
        ("tile", "classifier", other, "tile_path"),
        ("checkpoint", "other/classifier", place / "MGRS-A", "checkpoint_sha256"),
    ]:
        map_tile(place, tmp_path / name, checkpoint, tile_path=tile)
        path = tmp_path / name / "representation_map.npy"
        keywords = {"representation_path": path, "output_dir": folder}
        refused(f"found a map with another {key}", run, create_false_color_map, **keywords)
    map_tile(place, tmp_path / "int8", representation_format="int8")
    keywords["representation_path"] = tmp_path / "int8/representation_map.npy"
    run(create_false_color_map, **keywords)
    assert (folder / "false_color.png").exists()


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
        damaged = bytearray(whole[: rng.choice([len(whole), rng.randrange(1, len(whole))])])
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        basis.write_bytes(damaged)
        try:
            false_color.load_basis(basis, 8)
        except InputError as error:
            assert "\n" not in str(error)
    good = false_color.fit_basis(np.random.default_rng(0).normal(size=(50, 8)))
    for name, values in [
        ("mean", np.zeros(9, np.float32)),
        ("low", np.full(3, np.nan, np.float32)),
        ("high", np.zeros(3, np.float64)),
        ("components", np.array([{}])),
    ]:
        np.savez(basis, **good | {name: values})
        refused("basis.npz: found", false_color.load_basis, basis, 8)
    header = (
        b"\x93NUMPY\x01\x00v\x00"
        + str({"descr": "<f4", "fortran_order": False, "shape": (10**15,)}).encode().ljust(117)
        + b"\n"
    )
    with zipfile.ZipFile(basis, "w") as archive:
        archive.writestr("mean.npy", header)
    refused("mean is cut off", false_color.load_basis, basis, 8)


# ---- 9: hectares ---------------------------------------------------------------------------------


def test_hectares_follow_the_unit_of_the_crs():
    def hectares(crs, *transform, height=4):
        return row_hectares({"crs": crs, "transform": list(transform)}, height)

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
    # a local grid, and another planet: pixels are counted
    assert hectares('LOCAL_CS["site",UNIT["metre",1]]', 1, 0, 0, 0, -1, 0) is None
    assert hectares(MARS, 10, 0, 1e5, 0, -10, 1e6) is None
    assert row_hectares({}, 4) is None


MARS = """PROJCS["Mars",GEOGCS["Mars",DATUM["Mars",SPHEROID["Mars",3396190,169.89]],
PRIMEM["Reference_Meridian",0],UNIT["degree",0.0174532925199433]],
PROJECTION["Equirectangular"],UNIT["metre",1]]"""


def equal_area(crs, transform, row, column):
    """Hectares of a pixel by its outline in an equal-area projection, EPSG:6933."""
    steps = np.linspace(0, 1, 21)[:-1]
    across = np.concatenate([steps, np.ones(20), 1 - steps, np.zeros(20)]) + column
    down = np.concatenate([np.zeros(20), steps, np.ones(20), 1 - steps]) + row
    a, b, c, d, e, f = transform
    x, y = reproject(crs, "EPSG:6933", a * across + b * down + c, d * across + e * down + f)
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2e4


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:4087", [10, 0, 4e5, 0, -10, 6.7e6]),
        ("EPSG:32662", [10, 0, 4e5, 0, -10, 6.7e6]),
        ("ESRI:54030", [10, 0, 4e5, 0, -10, 6.2e6]),
        ("ESRI:54009", [10, 0, 4e5, 0, -10, 6.2e6]),  # keeps areas of the sphere
        ("EPSG:3857", [10, 0, 4e5, 0, -10, 8399738]),
        ("EPSG:3413", [10, 0, -1e6, 0, -10, -4e6]),
        ("EPSG:4326", [1e-4, 2e-5, 3, 2e-5, -1e-4, 51]),  # turned
        ("EPSG:3035", [10, 0, 4e6, 0, -10, 3e6]),
        ("EPSG:32631", [10, 0, 5e5, 0, -10, 54e5]),
    ],
)
def test_hectares_are_those_of_an_equal_area_projection(crs, transform):
    """Regression: in projections that keep no areas they were off by a factor of up to two."""
    found = row_hectares({"crs": crs, "transform": transform}, 1000, 1000)
    for row in (0, 500, 999):
        wanted = np.mean([equal_area(crs, transform, row, column) for column in (0, 500, 999)])
        assert found[row] == pytest.approx(wanted, rel=3e-3)


def test_hectares_of_a_map_of_the_world(tmp_path):
    """Outside of the globe there are no pixels; the whole of it has the area of the ellipsoid."""
    info = {"crs": "ESRI:54030", "transform": [1e5, 0, -171e5, 0, -1e5, 87e5]}
    latitude = np.linspace(90, -90, 1001)
    x, y = reproject("EPSG:4326", "ESRI:54030", np.full(1001, 179.9999), latitude)
    pixels = 2 * np.interp(-(87e5 - 1e5 * (np.arange(174) + 0.5)), -np.array(y), x, 0, 0) / 1e5
    hectares = row_hectares(info, 174, 342)
    assert (pixels * hectares).sum() == pytest.approx(51_006_562_172.4, rel=0.01)
    # areas that differ within a row, of a conic projection over a continent: pixels are counted
    lambert = {"crs": "EPSG:3034", "transform": [1000, 0, 2e6, 0, -1000, 5e6]}
    assert row_hectares(lambert, 4000, 4000) is None


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
    assert merge_classes(sources) == {"1": wheat, "2": maize}
    sources.append(("C/tile.json", {"classes": {"2": {"name": "Soy"}}}))
    line = refused("class 2", merge_classes, sources)
    assert "B/tile.json" in line
    assert "C/tile.json" in line


def test_another_colour_is_said_and_the_first_is_used(capsys):
    sources = [
        (name, {"classes": {"1": {"name": "Wheat", "color": color}}})
        for name, color in (("A/tile.json", "#aa0000"), ("B/tile.json", "#bb0000"))
    ]
    assert merge_classes(sources)["1"]["color"] == "#aa0000"
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
    colors = [entry["color"] for entry in class_legend(range(1, 256), {"0": {}}).values()]
    assert len(set(colors)) == 255


def test_a_legend_of_many_long_names_is_drawn_whole(tmp_path):
    """Regression: it was cut off and left no room for the map; a dollar sign began a formula."""
    names = {str(code): {"name": f"crop {code} at $_$ " + "a ton " * 10} for code in range(1, 61)}
    codes = np.arange(1, 61, dtype=np.uint8).reshape(6, 10)
    entries = list_classes(codes, class_legend(range(1, 61), names), {})
    figure = draw_maps({"": np.zeros((6, 10, 4), np.uint8)}, (6, 10), {}, "$_", entries)
    figure.savefig(tmp_path / "map.png")
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == 60
    assert box.y0 >= 0
    assert box.y1 < figure.axes[0].get_window_extent().y0
    assert box.x1 <= figure.bbox.width and box.x0 >= 0


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
    assert "labels.npy: found Wheat, which the map cannot have" in capsys.readouterr().out
    np.save(tile / "masks.npy", np.load(tile / "masks.npy"))
    run(read_inference_map, map_path=folder / "classification_map.npy")
    assert "has changed since it was mapped" in capsys.readouterr().out


def test_labels_of_another_place_are_refused(place, tmp_path, capsys):
    """Regression: labels of a tile of the same size elsewhere gave scores without a meaning."""
    (folder,) = map_tile(place, tmp_path / "out")
    elsewhere = {**GEO, "transform": [10, 0, 600000, 0, -10, 5400000]}
    other = make_tile(tmp_path / "MGRS-other", **elsewhere)
    labels, map_path = other / "labels.npy", folder / "classification_map.npy"
    line = r"labels.npy: found EPSG:32631 \(10, 0, 600000, .* wanted EPSG:32631 \(10, 0, 500000"
    refused(line, run, read_inference_map, map_path=map_path, labels_path=labels)
    keywords = {"representation_path": folder / "representation_map.npy"}
    refused(line, run, train_classification_maddy, labels_path=labels, **keywords)
    refused("tile.json: found EPSG:32631", run, explore, tile_path=other, **keywords)
    (other / "tile.json").unlink()
    capsys.readouterr()
    run(read_inference_map, map_path=map_path, labels_path=labels)
    assert "not known whether it shows the place of MGRS-A" in capsys.readouterr().out
    other_year = make_tile(tmp_path / "MGRS-A-2022", **GEO)
    run(read_inference_map, map_path=map_path, labels_path=other_year / "labels.npy")
    assert "not known" not in capsys.readouterr().out


# ---- resources -----------------------------------------------------------------------------------


def peak_bytes(function, *arguments):
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def large_map(path, size=6000):
    """A class map on the disk; returns its path."""
    array = create_npy(path, np.uint8, (size, size))
    array[:, : size // 2] = 40
    array[-1, -1] = 95
    return path


def test_a_large_class_map_is_drawn_in_little_memory(tmp_path, monkeypatch):
    class_map = read_map(large_map(tmp_path / "map.npy"))
    legend, figures = class_legend([40, 95], {}), []
    monkeypatch.setattr(pictures, "save_picture", lambda figure, path: figures.append(figure))
    peak = peak_bytes(plot_class_map, class_map, legend, "map.png", "", {})
    assert peak < 8 * class_map.size
    (figure,) = figures
    (image,) = figure.axes[0].images
    assert max(image.get_size()) <= MAX_SIDE
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    texts = [text.replace("\u00a0", " ") for text in texts]
    sizes = ["Cropland: 100.0%, 18000000 pixels", "Mangroves: 0.0%, 1 pixels", "no data"]
    assert texts == sizes, "the single pixel of 95 too"


def test_large_maps_are_read_in_blocks(tmp_path, monkeypatch):
    """Areas and agreement need memory for a block of rows, not for the map."""
    monkeypatch.setattr(reader, "BLOCK_PIXELS", 1 << 18)
    path = large_map(tmp_path / "map.npy")
    large_map(tmp_path / "labels.npy")
    config = {"labels_path": str(tmp_path / "labels.npy"), "pixels": "auto"}
    assert peak_bytes(read_inference_map.read_both, path, config) < 20 * (1 << 18) + (1 << 24)
    legend = class_legend([40, 95], {})
    assert peak_bytes(class_areas, read_map(path), legend, GEO) < 36_000_000
    rgba = create_npy(tmp_path / "rgba.npy", np.uint8, (3000, 2000, 4))
    rgba[1000:2100, 300:] = (1, 2, 3, 255)
    assert peak_bytes(write_geotiff, tmp_path / "a.tif", rgba, GEO, None) < rgba.nbytes / 4
    with rasterio.open(tmp_path / "a.tif") as file:
        np.testing.assert_array_equal(np.moveaxis(file.read(), 0, -1), rgba)


def test_counted_pairs_score_as_single_pixels_do():
    rng = np.random.default_rng(0)
    labels, predicted = rng.choice([1, 2, 3, 7], 500), rng.choice([1, 2, 3], 500)
    legend = class_legend([1, 2, 3, 5, 7], {})
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
