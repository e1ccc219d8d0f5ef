"""embed.py as a user runs it, on tables and cubes: the numbers of infer.py, and what it refuses."""

import json
import sys

from running.errors import InputError

import numpy as np
import pytest
from helpers import Fork, fine_tune, map_tile, run, tile_of, tiny
from series_data import cube, long_table

import embed
import train
from preparation import tables
from tiles import Tile

pandas = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="session")
def maps(workplace, tmp_path_factory):
    return map_pixels(workplace, tmp_path_factory.mktemp("maps"), min_valid=14)


def map_pixels(workplace, folder, **keywords):
    """Maps of infer.py as columns of pixels: embeddings, codes, confidence, clear dates."""
    (folder,) = map_tile(workplace, folder, **keywords)
    names = ("representation_map", "classification_map", "confidence", "valid_count")
    found = [np.load(folder / f"{name}.npy") for name in names]
    return [one.reshape(24 * 16, *one.shape[2:]) for one in found]


@pytest.fixture(scope="session")
def table(workplace):
    return long_table(tile_of(workplace))


def embed_data(workplace, data_path, output_path, checkpoint="classifier", **keywords):
    path = workplace / checkpoint / "best.pt"
    keywords = {"min_valid": 14, "data_path": data_path, "output_path": output_path} | keywords
    return run(embed, checkpoint_path=path, **keywords)


def assert_as_mapped(rows, maps):
    """The rows of an output, sorted by id, have the numbers of the maps."""
    embeddings, codes, confidence, counts = maps
    rows = rows.sort_values("id")
    assert rows["id"].tolist() == list(range(len(codes)))
    np.testing.assert_allclose(rows[[f"e{i}" for i in range(16)]], embeddings, atol=1e-5)
    assert (rows["class_code"] == codes).all()
    np.testing.assert_allclose(rows["confidence"], confidence, atol=1e-5)
    assert (rows["valid_count"] == counts).all()


def test_a_table_whose_rows_are_in_any_order(workplace, table, maps, tmp_path, capsys, monkeypatch):
    """CSV to CSV from the command line; small batches and groups change nothing."""
    table.to_csv(tmp_path / "series.csv", index=False)
    arguments = {"data_path": "series.csv", "output_path": "out/rows.csv", "device": "cpu"}
    arguments |= {"checkpoint_path": workplace / "classifier/best.pt", "wandb_mode": "disabled"}
    arguments["min_valid"] = 14
    monkeypatch.chdir(tmp_path)
    for name, value in {"BATCH_ROWS": 1000, "GROUP_PIXELS": 100}.items():
        monkeypatch.setattr(tables, name, value)
    process = Fork(*(f"{key}={value}" for key, value in arguments.items()), script=embed)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = pandas.read_csv("out/rows.csv")
    assert_as_mapped(found, maps)
    assert found["id"].tolist() == table["id"].drop_duplicates().tolist()
    few = int((maps[1] == 0).sum())
    assert few > 20
    assert f"{few} pixels have fewer clear observations than min_valid=14" in out
    assert f"out/rows.csv: {384 - few} of 384 pixels, 16 dimensions and 2 classes" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metrics.jsonl",
        "rows.csv",
    ]


def test_parquet_with_names_of_its_own(workplace, table, maps, tmp_path):
    """Reflectance of 0 to 1, days of year, NaN where not clear, a label, one more column."""
    renamed = {f"X{i}": f"band_{i}" for i in range(10)}
    other = table.rename(columns=renamed | {"id": "point", "date": "day"})
    bands = list(renamed.values())
    other[bands] = (other[bands] / 10_000).where(other.pop("clear") == 1)
    other["day"] = pandas.to_datetime(other["day"]).dt.day_of_year
    other["crop"] = np.where(other["point"] % 3 == 0, "maize", "beet")
    other["comment"] = "none"
    other.to_parquet(tmp_path / "series.parquet")
    keys = {"id_column": "point", "date_column": "day", "label_column": "crop", "scale": 1e4}
    output = tmp_path / "rows.parquet"
    embed_data(workplace, tmp_path / "series.parquet", output, bands=",".join(bands), **keys)
    found = pandas.read_parquet(output).rename(columns={"point": "id"})
    assert_as_mapped(found, maps)
    assert (found["crop"] == np.where(found["id"] % 3 == 0, "maize", "beet")).all()
    names = {0: "", 40: "Cropland", 95: "Mangroves"}
    assert (found["class_name"] == found["class_code"].map(names)).all()


def test_an_encoder_that_is_not_fine_tuned_to_npy(workplace, table, maps, tmp_path):
    """Embeddings as .npy, the first dimensions of them, ids in a .csv beside it; no class."""
    table.to_csv(tmp_path / "series.csv", index=False, sep=";")
    output = tmp_path / "rows.npy"
    keywords = {"checkpoint": "pretrained", "dimensions": 5}
    embed_data(workplace, tmp_path / "series.csv", output, **keywords)
    embeddings, beside = np.load(output), pandas.read_csv(tmp_path / "rows.csv")
    assert embeddings.shape == (384, 5)
    assert list(beside.columns) == ["id", "valid_count"]
    (folder,) = map_tile(workplace, tmp_path / "map", checkpoint="pretrained", min_valid=14)
    wanted = np.load(folder / "representation_map.npy").reshape(384, 16)[beside["id"]]
    np.testing.assert_allclose(embeddings, wanted[:, :5], atol=1e-5)


def test_a_season_is_all_that_is_read_and_counted(workplace, table, tmp_path):
    keys = {"start": "60", "end": "07-01", "min_valid": 5}
    table.to_csv(tmp_path / "series.csv", index=False)
    embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv", **keys)
    maps = map_pixels(workplace, tmp_path / "maps", **keys)
    assert maps[-1].max() < 12, "of 20 dates"
    assert_as_mapped(pandas.read_csv(tmp_path / "rows.csv"), maps)


def test_the_first_clear_row_of_a_date_counts(workplace, table, maps, tmp_path, capsys):
    """Also where it comes after one that is not clear; the others are counted."""
    ids = np.arange(384)
    cloudy = pandas.DataFrame({"id": ids, "date": "2021-07-01", "clear": 0})
    again = table[table["clear"] == 1].copy()
    again[[f"X{i}" for i in range(10)]] = 9000
    both = pandas.concat([table, cloudy, again])
    cloudy_first = table.assign(clear=0)
    pandas.concat([cloudy_first, both]).to_csv(tmp_path / "series.csv", index=False)
    embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv")
    assert_as_mapped(pandas.read_csv(tmp_path / "rows.csv"), maps)
    assert (
        f"{len(again)} clear rows have the id and the date of an earlier" in capsys.readouterr().out
    )


def test_ids_are_as_they_were_written(workplace, table, tmp_path):
    """Regression: 007 became 7, and NA nothing."""
    ids = table["id"].astype(str).str.zfill(3).replace({"000": "NA"})
    table.assign(id=ids).to_csv(tmp_path / "series.csv", index=False)
    embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.parquet")
    found = pandas.read_parquet(tmp_path / "rows.parquet")["id"]
    assert found.tolist() == ids.drop_duplicates().tolist()


MISTAKES = [
    ({"X3": None}, {}, "series.csv: found no column X3 .*, but id, date, X0"),
    ({"id": None}, {}, "found no column id \\(id_column\\), but date, X0"),
    ({}, {"clear_column": "mask"}, "found no column mask \\(clear_column\\)"),
    ({}, {"bands": "X0,X1"}, "bands=X0,X1: found 2 bands, wanted 10 as in .*: X0, X1"),
    ({"X3": "dark"}, {}, "found X3 dark, wanted a number or an empty cell"),
    ({"clear": 7}, {}, "found clear 7, wanted 1 \\(clear\\) or 0"),
    ({"date": "soon"}, {}, "column date: found soon, wanted days of year"),
    (
        {"date": ["5"] + ["2021-06-05"] * 7679},
        {},
        "column date: found 5, wanted days",
    ),
    ({"date": ""}, {}, "found a row without date, wanted dates"),
    ({"id": ""}, {}, "found a row without id, wanted one in each"),
    ({}, {"scale": 1e4}, "reflectance: found a median of .* times scale=10000, wanted"),
    ({}, {"output_path": "rows.zarr"}, "rows.zarr: wanted a name in .parquet, .pq, .csv"),
    ({}, {"output_path": "series.csv"}, "found .*series.csv, wanted another or overwrite=true"),
    ({}, {"data_path": "other.csv"}, "other.csv: found no such table or cube"),
    ({}, {"classify": "true", "checkpoint": "pretrained"}, "found a pretrained checkpoint"),
]


@pytest.mark.parametrize(("columns", "keys", "message"), MISTAKES)
def test_mistakes_in_a_table_end_in_one_line(
    workplace, table, tmp_path, monkeypatch, columns, keys, message
):
    monkeypatch.chdir(tmp_path)
    for name, value in columns.items():
        table = table.drop(columns=name) if value is None else table.assign(**{name: value})
    table.to_csv("series.csv", index=False)
    keys = {"data_path": "series.csv", "output_path": "out/rows.csv"} | keys
    with pytest.raises(InputError, match=message) as error:
        embed_data(workplace, **keys)
    assert "\n" not in str(error.value)
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["series.csv"], "nothing is left"


def test_years_of_one_pixel_are_not_mixed(workplace, table, tmp_path):
    table.iloc[:1].assign(date="2019-05-01", clear=1).to_csv(tmp_path / "series.csv", index=False)
    table.iloc[1:].to_csv(tmp_path / "series.csv", index=False, header=False, mode="a")
    pixel = table["id"].iloc[0]
    with pytest.raises(
        InputError, match=f"found 2019-05-01 to 2021.* for id {pixel}, wanted a year"
    ):
        embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv")


def test_files_that_are_no_table(workplace, tmp_path):
    (tmp_path / "series.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "empty.csv").write_text("")
    for name in ("series.parquet", "empty.csv"):
        with pytest.raises(InputError, match=f"{name}: found no readable table"):
            embed_data(workplace, tmp_path / name, tmp_path / "rows.csv")


@pytest.mark.slow
def test_a_table_trains(workplace, table, tmp_path):
    """As a tile of N x 1 pixels: the same series and labels, and an encoder trained on them."""
    labels = np.load(tile_of(workplace) / "labels.npy").ravel()
    crops = np.where(labels[table["id"]] == 40, "maize", "beet")
    table.assign(label=crops).to_csv(tmp_path / "series.csv", index=False)
    folder = tmp_path / "data/points/processed/MGRS-points"
    bands = ",".join(f"X{i}" for i in range(10))
    run(embed, data_path=tmp_path / "series.csv", output_path=folder, bands=bands)
    tile, wanted = Tile(folder), Tile(tile_of(workplace))
    ids = np.load(folder / "ids.npy").astype(int)
    assert (tile.doys == wanted.doys).all()
    masks = wanted.masks.reshape(20, -1)[:, ids]
    assert (tile.masks[:, :, 0] == masks).all()
    assert (tile.bands[:, :, 0] == wanted.bands.reshape(20, -1, 10)[:, ids])[masks == 1].all()
    np.testing.assert_allclose(tile.band_mean, wanted.band_mean, rtol=1e-5)
    np.testing.assert_allclose(tile.band_std, wanted.band_std, rtol=1e-4)
    assert tile.info["classes"] == {"1": {"name": "beet"}, "2": {"name": "maize"}}
    assert (tile.labels[:, 0] == np.where(labels[ids] == 40, 2, 1)).all()
    train.main(tiny(tmp_path, tmp_path / "encoder", dataset_name="points", max_steps=4))
    keys = {"checkpoint_path": tmp_path / "encoder/best.pt", "dataset_name": "points"}
    scores = fine_tune(tmp_path, tmp_path / "crops", epochs=2, **keys)
    assert scores["macro_f1"] > 0.8


@pytest.mark.parametrize(
    ("name", "module"), [("series.csv", "pandas"), ("series.csv", "pyarrow"), ("x.zarr", "xarray")]
)
def test_packages_that_are_not_installed(workplace, table, tmp_path, monkeypatch, name, module):
    table.to_csv(tmp_path / "series.csv", index=False)
    (tmp_path / "x.zarr").mkdir()
    monkeypatch.setitem(sys.modules, module, None)
    output = tmp_path / name.replace("series", "rows").replace("x.", "y.")
    message = f"{module}: not installed, wanted pip install -r requirements-tables.txt"
    with pytest.raises(InputError, match=message):
        embed_data(workplace, tmp_path / name, output)


# ---- cubes ---------------------------------------------------------------------------------------


@pytest.fixture
def xarray():
    for module in ("dask.array", "zarr"):
        pytest.importorskip(module)
    return pytest.importorskip("xarray")


def assert_cube_as_mapped(found, maps):
    for name, wanted in zip(
        ("embedding", "class_code", "confidence", "valid_count"), maps, strict=True
    ):
        values = found[name].values
        np.testing.assert_allclose(values.reshape(wanted.shape), wanted, atol=1e-5)


@pytest.mark.parametrize("chunks", [(20, 24, 16, 10), (20, 7, 5, 10), (1, 24, 16, 3)])
def test_a_cube_by_blocks(workplace, maps, tmp_path, xarray, monkeypatch, chunks):
    """Bands in another order, chunks that fit blocks or not; place, CRS, attributes are kept."""
    array = cube(tile_of(workplace), scale=1e-4)[..., ::-1]  # of the bands
    data = array.chunk(dict(zip(array.dims, chunks, strict=True))).to_dataset()
    data = data.assign_coords(spatial_ref=((), 0, {"crs_wkt": "EPSG:32631"}))
    data["reflectance"].attrs["grid_mapping"] = "spatial_ref"
    data.assign_attrs(title="a toy").to_zarr(tmp_path / "cube.zarr", zarr_format=2)
    monkeypatch.setattr("preparation.cubes.BLOCK_BYTES", 4 * 20 * 10 * 60)  # 60 pixels
    embed_data(workplace, tmp_path / "cube.zarr", tmp_path / "out.zarr", scale=1e4)
    found = xarray.open_zarr(tmp_path / "out.zarr", decode_coords="all")
    assert_cube_as_mapped(found, maps)
    assert (found.x == data.x).all() and (found.y == data.y).all()
    assert found.spatial_ref.attrs["crs_wkt"] == "EPSG:32631"
    assert found.attrs["title"] == "a toy"
    assert found["class_code"].encoding["grid_mapping"] == "spatial_ref"
    classes = {"40": "Cropland", "95": "Mangroves"}
    assert json.loads(found["class_code"].attrs["classes"]) == classes
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cube.zarr",
        "metrics.jsonl",
        "out.zarr",
    ]


def test_a_cube_of_a_variable_for_each_band(workplace, maps, tmp_path, xarray):
    """Other names of dimensions, bands in another order, 0 for nodata, and a variable of masks."""
    array = cube(tile_of(workplace))
    clear = np.isfinite(array).all("band")
    data = array.fillna(60_000)[..., ::-1].astype("uint16").to_dataset("band")
    data["valid"] = clear.astype("uint8")
    data = data.rename(time="t", x="lon", y="lat")
    data.to_zarr(tmp_path / "cube.zarr", zarr_format=2)
    keys = {"dims": "t,lat,lon,band", "clear_column": "valid"}
    embed_data(workplace, tmp_path / "cube.zarr", tmp_path / "out.zarr", **keys)
    assert_cube_as_mapped(xarray.open_zarr(tmp_path / "out.zarr"), maps)


def test_mistakes_in_a_cube_end_in_one_line(workplace, tmp_path, xarray):
    array = cube(tile_of(workplace))
    years = array.time.values + np.arange(20) * np.timedelta64(100, "D")
    other = array.assign_coords(band=[f"B{i}" for i in range(10)])
    for number, (data, keys, message) in enumerate(
        [
            (array, {"scale": 1e4}, "found a median of .* times scale=10000"),
            (array, {"variable": "red"}, "found the variables reflectance \\(time, y, x, band\\)"),
            (array, {"dims": "time,y,x"}, "dims=time,y,x: wanted the names of time, y, x and band"),
            (array, {"dims": "t,y,x,band"}, "wanted variable= one of them with .* t,y,x,band"),
            (array, {"output_path": tmp_path / "rows.csv"}, "wanted a name in .zarr of a cube"),
            (array.assign_coords(time=years), {}, "found 2021-.* to 202.*, wanted a year at most"),
            (array.drop_vars("time"), {}, "found no coordinates of time"),
            (other, {}, "found no band X0 among B0,.*, wanted X0,"),
        ]
    ):
        path = tmp_path / f"cube{number}.zarr"
        data.to_dataset(name="reflectance").to_zarr(path, zarr_format=2)
        keys = {"data_path": path, "output_path": tmp_path / "out.zarr"} | keys
        with pytest.raises(InputError, match=message) as error:
            embed_data(workplace, **keys)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("*out*"))
    (tmp_path / "nothing.zarr").mkdir()
    with pytest.raises(InputError, match="nothing.zarr: found no readable cube"):
        embed_data(workplace, tmp_path / "nothing.zarr", tmp_path / "out.zarr")


def test_a_training_folder_and_an_output_that_is_there(workplace, table, tmp_path):
    table.to_csv(tmp_path / "series.csv", index=False)
    embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv")
    before = (tmp_path / "rows.csv").read_bytes()
    with pytest.raises(InputError, match="rows.csv, wanted another or overwrite=true"):
        embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv")
    embed_data(workplace, tmp_path / "series.csv", tmp_path / "rows.csv", overwrite=True)
    assert (tmp_path / "rows.csv").read_bytes() == before
    fine_tune(workplace, tmp_path / "run", epochs=1)
    with pytest.raises(InputError, match="of a training"):
        embed_data(workplace, tmp_path / "series.csv", tmp_path / "run/rows.csv")


def test_a_table_of_another_unit_makes_no_tile(table, tmp_path):
    """Reflectance of 0 to 1 would become 0 or 1 in whole numbers."""
    bands = [f"X{i}" for i in range(10)]
    table.assign(**{name: table[name] / 1e4 for name in bands}).to_csv(tmp_path / "series.csv")
    folder = tmp_path / "processed/MGRS-points"
    keys = {"data_path": tmp_path / "series.csv", "output_path": folder, "bands": ",".join(bands)}
    with pytest.raises(InputError, match="scale=10000 multiplies reflectance of 0 to 1"):
        run(embed, **keys)
    assert not list(folder.parent.glob("*"))
    run(embed, **keys, scale=10_000)
    values = table[bands].to_numpy()[table["clear"] == 1]
    assert Tile(folder).bands[Tile(folder).masks == 1].sum() == values.astype(int).sum()
