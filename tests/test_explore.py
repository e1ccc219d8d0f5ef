"""explore.py: what it puts into a page, how large that gets, and what it refuses."""

import json
import re

from running.errors import InputError

import numpy as np
import pytest
from browser import GEO, facts_of, make_page, random_map, read_blob, save_map
from helpers import make_tile
from rasterio.crs import CRS
from rasterio.warp import transform as reproject

import explore
from explorer.page import FOLDER, PAGE_MODULES, WORKER_MODULES
from maps import reader
from maps.writer import quantise


def test_pca_keeps_the_variance_it_says(tmp_path):
    values = random_map((40, 50, 12), seed=1) @ np.diag([9, 6, 4, 2, 1, *[0.05] * 7])
    path = save_map(tmp_path, values)
    facts = facts_of(make_page(representation_path=path))["embedding"]
    share = np.linalg.eigvalsh(np.cov(values.reshape(-1, 12).T))[::-1]
    share = np.cumsum(share) / share.sum()
    assert facts["dimensions"] == 1 + np.searchsorted(share, 0.999)
    assert facts["variance"] == pytest.approx(share[facts["dimensions"] - 1], abs=1e-6)
    for keywords, wanted in (
        ({"dimensions": 2}, 2),
        ({"variance": 0.9}, 3),
        ({"variance": 1.0}, 12),
    ):
        found = facts_of(make_page(representation_path=path, **keywords))["embedding"]["dimensions"]
        assert found == wanted, keywords


def test_int8_maps_and_basis_path(tmp_path):
    values = random_map()
    path = save_map(tmp_path / "a", values)
    small, scales = quantise(values.astype(np.float32))
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b/representation_map.npy", small)
    np.save(tmp_path / "b/representation_map_scales.npy", scales)
    basis = tmp_path / "basis.npz"
    np.savez(
        basis,
        mean=np.zeros(6, np.float32),
        components=np.eye(6, dtype=np.float32)[:3],
        low=np.full(3, -3, np.float32),
        high=np.full(3, 3, np.float32),
    )
    pages = [
        make_page(representation_path=one, basis_path=basis)
        for one in (path, tmp_path / "b/representation_map.npy")
    ]
    colors = [
        read_blob(page, facts_of(page)["scenes"][0]["layers"]["falseColor"]) for page in pages
    ]
    wanted = ((values[..., :3] + 3) / 6).clip(0, 1) * 255
    np.testing.assert_allclose(colors[0].reshape(20, 30, 3), wanted.round(), atol=1)
    np.testing.assert_allclose(colors[1].astype(int), colors[0].astype(int), atol=3)


def test_the_page_stays_within_max_mb_and_says_how(tmp_path, capsys):
    tile = make_tile(tmp_path / "MGRS-0", (60, 60, 50, 10), **GEO)
    path = save_map(tmp_path / "out", random_map((60, 50, 16)), tile_path=str(tile))
    page = make_page(representation_path=path, max_mb=4)
    assert page.stat().st_size <= 4e6
    assert facts_of(page)["scenes"][0]["stride"] == 1
    assert facts_of(page)["scenes"][0]["series"]["step"] > 1
    big = save_map(tmp_path / "big", random_map((300, 400, 16)), **GEO)
    page = make_page(representation_path=big, max_mb=4)
    scene = facts_of(page)["scenes"][0]
    assert page.stat().st_size <= 4e6
    assert scene["stride"] > 1
    assert (scene["height"], scene["fullHeight"]) == (-(-300 // scene["stride"]), 300)
    assert "thinned to one of" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"max_mb=4: found maps that need .* MB at stride=1"):
        make_page(representation_path=big, max_mb=4, stride=1)


def test_a_full_tile_is_thinned_before_it_is_read(tmp_path):
    """10980 x 10980 pixels of 64 dimensions, a file with holes: no block of it is read in full."""
    path = tmp_path / "representation_map.npy"
    np.lib.format.open_memmap(path, "w+", np.float16, (10980, 10980, 64))
    scenes = explore.open_scenes({"representation_path": str(path), "tile_path": ""})
    config = {**explore.run_config, "max_mb": 200.0}
    left = explore.choose_stride(scenes, config)
    assert scenes[0].stride == 7  # 16 + 32 bytes a pixel
    assert left >= 0
    _, block = next(scenes[0].blocks(7))
    assert block.nbytes <= reader.BLOCK_BYTES
    with pytest.raises(InputError, match="wanted that much, or stride=7"):
        explore.choose_stride(scenes, {**config, "stride": 2})


@pytest.mark.parametrize("crs", ["EPSG:32733", "EPSG:32631", "EPSG:32601", "EPSG:3035"])
def test_places_agree_with_rasterio(crs):
    """On a full tile, in the middle of every cell, where interpolation is farthest off."""
    a, b, c, d, e, f = transform = [10, 0, 199980, 0, -10, 5900040]
    info = {"crs": crs, "transform": transform}
    grid = explore.describe_place(info, (10980, 10980))["grid"]
    shape = grid["rows"], grid["columns"]
    corners = (np.array(grid[key]).reshape(shape) for key in ("lon", "lat"))
    lon, lat = ((one[1:, 1:] + one[1:, :-1] + one[:-1, 1:] + one[:-1, :-1]) / 4 for one in corners)
    assert np.abs(np.diff(lon, axis=1)).max() < 1  # no jump at the date line
    row, column = ((np.indices(lon.shape) + 0.5).T * 10980 / (np.array(shape) - 1)).T
    x, y = (a * column + b * row + c).ravel(), (d * column + e * row + f).ravel()
    true_lon, true_lat = (np.reshape(v, lon.shape) for v in reproject(crs, "EPSG:4326", x, y))
    east = ((lon - true_lon + 180) % 360 - 180) * np.cos(np.radians(lat))
    assert 111_320 * np.hypot(east, lat - true_lat).max() < 0.5


def test_the_page_has_hectares_of_the_ground_where_all_rows_have_the_same():
    """Regression: where a projection keeps no areas, hectares were those of its plane."""
    info = {"crs": "EPSG:4087", "transform": [10, 0, 4e5, 0, -10, 6.7e6]}
    assert explore.describe_place(info, (1000, 1000))["hectares"] == pytest.approx(0.005, rel=0.02)
    world = {"crs": "EPSG:4326", "transform": [1, 0, -180, 0, -1, 90]}
    assert "hectares" not in explore.describe_place(world, (180, 360))


def test_codes_that_mean_two_classes_are_said(tmp_path, capsys):
    """Regression: maps of tiles whose codes mean different crops were put together silently."""
    names = {"maize": {"1": {"name": "maize"}}, "wheat": {"1": {"name": "wheat"}}}
    paths = [
        save_map(tmp_path / name, random_map(), classes=classes) for name, classes in names.items()
    ]
    make_page(representation_path=f"{paths[0]},{paths[1]}")
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "joins labels by name" in line]
    assert line.startswith(f"{paths[1].parent}/infer.json: found name 'wheat' for class 1, wanted")
    assert f"'maize' as in {paths[0].parent}/infer.json" in line
    make_page(representation_path=f"{paths[0]},{paths[0]}")
    assert "joins labels by name" not in capsys.readouterr().out


def test_maps_of_one_title_are_told_apart(tmp_path):
    """By the years of their tiles' dates, else by the folders that differ, else by a number."""
    made = [save_map(tmp_path / year / "MGRS-0", random_map()) for year in ("wet", "dry")]
    other = save_map(tmp_path / "MGRS-1", random_map())
    for key in ("", "dates"):
        for number, path in enumerate(made):
            tile = make_tile(tmp_path / f"{key}{number}" / "MGRS-0", (2, 20, 30, 4))
            dates = [f"{2020 + number}-01-01", f"{2020 + number}-12-31"]
            np.save(tile / "doys.npy", np.array([1, 366 - number], np.int16))
            about = {"bands": ["X0", "X1", "X2", "X3"]} | ({"dates": dates} if key else {})
            (tile / "tile.json").write_text(json.dumps(about))
            (path.parent / "infer.json").write_text(json.dumps({"tile_path": str(tile)}))
        facts = facts_of(make_page(representation_path=f"{made[0]},{made[1]},{other}"))
        titles = [one["title"] for one in facts["scenes"]]
        wanted = ["MGRS-0 2020", "MGRS-0 2021"] if key else ["MGRS-0 wet", "MGRS-0 dry"]
        assert titles == [*wanted, "MGRS-1"]
        assert [one["grid"] for one in facts["scenes"]] == [0, 1, 2]  # no place is known
    facts = facts_of(make_page(representation_path=f"{other},{other}"))
    assert [one["title"] for one in facts["scenes"]] == ["MGRS-1 1", "MGRS-1 2"]


def test_maps_of_one_grid_are_known(tmp_path):
    """However their CRS is written."""
    wkt = CRS.from_user_input(GEO["crs"]).to_wkt()
    shifted = {**GEO, "transform": [20, 0, 400020, 0, -20, 7500000]}
    infos = [GEO, shifted, {**GEO, "crs": wkt}, GEO]
    shapes = [(20, 30, 6)] * 3 + [(20, 31, 6)]
    paths = [
        save_map(tmp_path / str(number), random_map(shape), **info)
        for number, (info, shape) in enumerate(zip(infos, shapes, strict=True))
    ]
    facts = facts_of(make_page(representation_path=",".join(map(str, paths))))
    assert [one["grid"] for one in facts["scenes"]] == [0, 1, 0, 3]
    assert {one["place"]["epsg"] for one in facts["scenes"]} == {32733}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"representation_path": ""}, "representation_path: found none"),
        ({"tile_path": "a,b"}, "found 2 tiles, wanted 1"),
        ({"max_mb": 3.9}, "max_mb=3.9: wanted 4"),
        ({"dimensions": 0}, "dimensions=0: wanted 1"),
        ({"basis_path": "MAP"}, "found no basis"),
        ({"bands": "B04,X"}, "found no B04, wanted of X0"),
        ({"stride": -1}, "stride=-1: wanted 0"),
    ],
)
def test_mistakes_end_in_one_line_and_no_page(tmp_path, change, message):
    tile = make_tile(tmp_path / "MGRS-0", (20, 20, 30, 4))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile))
    change = {key: path if value == "MAP" else value for key, value in change.items()}
    with pytest.raises(InputError, match=message) as error:
        make_page(**{"representation_path": path, **change})
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*explore*"))


def test_files_that_do_not_fit_are_refused(tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (20, 21, 30, 4))
    path = save_map(tmp_path / "out", random_map(), tile_path=str(tile))
    with pytest.raises(InputError, match="found 20 x 30 pixels, wanted 21 x 30"):
        make_page(representation_path=path)
    other = save_map(tmp_path / "other", random_map((5, 5, 3)))
    path = save_map(tmp_path / "out", random_map())
    with pytest.raises(InputError, match=r"found 3 dimensions, wanted 6"):
        make_page(representation_path=f"{path},{other}")
    save_map(tmp_path / "out", np.full((20, 30, 6), np.nan))
    with pytest.raises(InputError, match="found 0 valid pixels"):
        make_page(representation_path=path)
    save_map(tmp_path / "out", random_map(), classes={"1": {"name": "a", "color": "red; x"}})
    with pytest.raises(InputError, match="found classes"):
        make_page(representation_path=path)
    (tmp_path / "out/infer.json").write_text("{")
    with pytest.raises(InputError, match=r"infer.json: found no readable JSON"):
        make_page(representation_path=path)


def test_the_same_maps_make_the_same_page(tmp_path):
    path = save_map(tmp_path, random_map())
    assert (
        make_page(representation_path=path).read_bytes()
        == make_page(representation_path=path).read_bytes()
    )


def test_the_page_s_modules_fit_together():
    """They share one scope, so each top-level name is one module's; lines and files are short."""
    names = {}
    for name in {*PAGE_MODULES, *WORKER_MODULES}:
        text = (FOLDER / name).read_text()
        assert len(text.splitlines()) <= 500, name
        assert max(map(len, text.splitlines())) <= 100, name
        found = re.findall(
            r"^(?:export )?(?:async )?(?:const|let|function|class) (\w+)", text, re.M
        )
        for one in found:
            assert names.setdefault(one, name) == name, f"{one}: in {names[one]} and {name}"
        for imported in re.findall(r'^import [^;]* from "./(.*?)";', text, re.M):
            assert (FOLDER / imported).exists()
    listed = {*PAGE_MODULES, *WORKER_MODULES}
    assert {path.name for path in FOLDER.glob("*.js")} == listed


def test_median_colour_is_numpys(tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (21, 30, 20, 4), bands=["B08", "B04", "B02", "B03"])
    path = save_map(tmp_path / "out", random_map((30, 20, 6)), tile_path=str(tile))
    for stride in (1, 3):
        page = make_page(representation_path=path, stride=stride)
        found = read_blob(page, facts_of(page)["scenes"][0]["layers"]["median"])
        thin = slice(None), slice(None, None, stride), slice(None, None, stride)
        clear = np.load(tile / "masks.npy")[thin] > 0
        bands = np.load(tile / "bands.npy")[thin][..., [1, 3, 2]].astype(float)
        bands[~clear] = np.nan
        wanted = np.nanmedian(bands, axis=0)
        low, high = np.percentile(wanted.reshape(-1, 3), (2, 98), axis=0)
        wanted = ((wanted - low) / (high - low)).clip(0, 1) * 254 + 1
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1)
