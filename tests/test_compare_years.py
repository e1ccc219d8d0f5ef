"""compare_years.py: what changed between two years, from maps whose truth is known."""

import json
import tracemalloc

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rasterio
from helpers import assert_pictures_logged
from map_helpers import GEO, map_in, refused, run

import compare_years
from maps import change, reader
from maps.false_color import fit_basis
from maps.writer import MapWriter

SHAPE = (48, 64)
CLASSES = {"1": {"name": "Maize"}, "2": {"name": "Wheat"}, "7": {"name": "Water"}}


def write_map(folder, values, codes=None, confidence=None, **info):
    """A map as infer.py leaves it; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "representation_map.npy", values.astype(np.float32))
    content = {"tile": "MGRS-A", "checkpoint_sha256": "a" * 64, "classes": CLASSES, **GEO, **info}
    (folder / "infer.json").write_text(json.dumps(content))
    if codes is not None:
        np.save(folder / "classification_map.npy", codes.astype(np.uint8))
        np.save(folder / "confidence.npy", confidence.astype(np.float32))
    return folder


def make_years(path, seed=0, classes=True, **info):
    """Two years of 12 x 16 fields of 4 x 4 pixels, some of another class in the second.

    Fields differ from year to year along some directions more than along others, and the second
    year is another one for all pixels. Returns the folders and where the class changed (H, W).
    """
    rng = np.random.default_rng(seed)
    fields = (SHAPE[0] // 4, SHAPE[1] // 4)
    first = rng.choice([1, 2, 7], fields)
    changed = rng.random(fields) < 0.1
    second = np.where(changed, np.array([0, 2, 7, 0, 0, 0, 0, 1])[first], first)
    spread, middle = np.geomspace(2, 0.1, 16), 2 * rng.normal(size=(8, 16))
    parts = []
    for codes in (first, second):
        values = middle[codes] + rng.normal(size=(*fields, 16)) * spread
        values = values.repeat(4, 0).repeat(4, 1) + rng.normal(size=(*SHAPE, 16)) * 0.3 * spread
        parts.append((values, codes.repeat(4, 0).repeat(4, 1)))
    parts[1][0][:] += rng.normal(size=16) * 3
    parts[0][0][:2], parts[1][0][:, 0] = np.nan, np.nan  # no data
    folders = []
    for year, (values, codes) in zip(("2024", "2025"), parts, strict=True):
        codes = np.where(np.isfinite(values[..., 0]), codes, 0)
        confidence = np.where(codes > 0, rng.uniform(0.5, 1, SHAPE), np.nan)
        known = (codes, confidence) if classes else ()
        folders.append(write_map(path / year, values, *known, years=year, **info))
    return *folders, parts[0][1] != parts[1][1]


def compare(before, after, **keywords):
    return run(compare_years, before_path=before, after_path=after, **keywords)


@pytest.fixture(scope="module")
def years(tmp_path_factory):
    """(before, after, truth, folder of the comparison, its result)."""
    path = tmp_path_factory.mktemp("years")
    before, after, truth = make_years(path)
    np.save(path / "truth.npy", truth)
    result = compare(before, after, truth_path=path / "truth.npy")
    return before, after, truth, after / "change", result


def test_changed_fields_are_found_at_the_false_alarms_that_are_named(years):
    _, _, truth, folder, result = years
    scores, codes = (np.load(folder / f"{name}.npy") for name in ("change", "changed"))
    no_data = np.zeros(SHAPE, bool)
    no_data[:2] = no_data[:, 0] = True
    assert (np.isnan(scores) == no_data).all() and ((codes == 0) == no_data).all()
    assert scores.dtype == np.float32 and codes.dtype == np.uint8
    found, known = codes > 1, ~no_data
    recall, false = found[truth & known].mean(), found[~truth & known].mean()
    assert recall > 0.7
    assert false < 0.03
    assert result["scores"]["recall"] == pytest.approx(recall)
    assert result["scores"]["false_alarms"] == pytest.approx(false)
    assert result["scores"]["precision"] == pytest.approx(truth[found].mean())
    assert (scores[known & found].min() > 2.326) and (scores[known & ~found].max() < 2.327)


def test_what_differs_between_years_everywhere_counts_less():
    """Of two moves of one length, that along a direction in which all pixels move is no change."""
    pair = np.random.default_rng(0).normal(size=(5000, 16))
    pair[:, 8:] = pair[:, :8] + np.random.default_rng(1).normal(size=(5000, 8)) * [4, *[0.3] * 7]
    no_change = change.fit_change(pair, "map")
    moved = pair[:2].copy()
    moved[:, 8:] = moved[:, :8] + 5 * np.eye(8)[[0, 3]]
    scores = no_change.scores(moved)
    assert scores[0] < 1.5 < 2.5 < scores[1]
    assert np.median(no_change.scores(pair)) == pytest.approx(0, abs=1e-3)


def test_a_shift_of_all_pixels_is_no_change(years, tmp_path):
    """Another year is another one for all pixels: only what differs from the others counts."""
    before, after, _, folder, _ = years
    values = np.load(after / "representation_map.npy") + np.arange(16, dtype=np.float32)
    moved = write_map(tmp_path / "moved", values, years="2025")
    compare(before, moved)
    for name in ("change", "changed"):
        one, other = (np.load(path / f"{name}.npy") for path in (folder, moved / "change"))
        if name == "changed":
            one = one.clip(0, 2)  # without classes none is certain
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_a_sample_that_is_small_for_its_dimensions_is_named(tmp_path, capsys):
    rng = np.random.default_rng(0)
    folders = [write_map(tmp_path / year, rng.normal(size=(16, 20, 64))) for year in "ab"]
    result = compare(*folders)
    assert result["changed"] / result["compared"] > 0.02, "though 0.01 is asked for"
    line = f"{folders[1]}/representation_map.npy: found 320 pixels to learn no change of 64 dimens"
    assert line in capsys.readouterr().out
    for year, folder in zip("cd", folders, strict=True):
        write_map(tmp_path / year, np.load(folder / "representation_map.npy")[..., :16])
    compare(tmp_path / "c", tmp_path / "d")
    assert "found 320 pixels" not in capsys.readouterr().out


def test_areas_of_pixels_below_a_square_metre_are_not_rounded_away(tmp_path):
    """Regression: 0.00003 ha were rounded to 0, by which the share of change was divided."""
    rng, fine = np.random.default_rng(0), {**GEO, "transform": [0.1, 0, 500000, 0, -0.1, 5400000]}
    folders = [write_map(tmp_path / year, rng.normal(size=(5, 6, 3)), **fine) for year in "ab"]
    assert compare(*folders)["compared"] == pytest.approx(30 * 0.1**2 / 10_000, rel=2e-3)


def test_changed_npy_of_two_years_after_the_first_is_no_truth_of_what_lies_between(tmp_path):
    """Regression: what changed since the first year was taken for what changed in between."""
    folders = make_years(tmp_path, classes=False)[:2]
    for year, folder in zip(("2025", "2026"), folders, strict=True):
        tile = tmp_path / "tiles" / year
        tile.mkdir(parents=True)
        (tile / "tile.json").write_text(json.dumps({"classes": CLASSES, **GEO}))
        np.save(tile / "labels.npy", np.ones(SHAPE, np.uint8))
        np.save(tile / "changed.npy", np.ones(SHAPE, bool))
        info = json.loads((folder / "infer.json").read_text())
        (folder / "infer.json").write_text(json.dumps(info | {"tile_path": str(tile)}))
    result = compare(*folders)
    assert result["truth"].startswith("labels of both years") and result["scores"]["recall"] is None


@pytest.mark.parametrize("false_alarms", [0.01, 0.1])
def test_where_nothing_changed_the_false_alarms_are_those_named(tmp_path, false_alarms):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(120, 100, 16))
    noise = rng.normal(size=(2, 120, 100, 16)) * np.geomspace(1, 0.1, 16)
    folders = [write_map(tmp_path / str(n), truth + part) for n, part in enumerate(noise)]
    result = compare(*folders, false_alarms=false_alarms)
    share = result["changed"] / result["compared"]
    assert false_alarms / 2 < share < 1.5 * false_alarms


def test_the_matrix_has_the_hectares_of_each_change_and_those_that_are_certain(years):
    before, after, _, folder, result = years
    codes = np.load(folder / "changed.npy")
    first, second = (np.load(path / "classification_map.npy") for path in (before, after))
    sure = [np.load(path / "confidence.npy") >= 0.8 for path in (before, after)]
    assert result["unit"] == "ha"
    assert list(result["classes"].values()) == ["Maize", "Wheat", "Water"]
    certain = (codes > 1) & sure[0] & sure[1] & (first != second)
    assert ((codes == 3) == certain).all() and certain.any()
    for i, one in enumerate((1, 2, 7)):
        for j, other in enumerate((1, 2, 7)):
            moved = (codes > 1) & (first == one) & (second == other)
            stays = (codes == 1) & (first == one) & (one == other)
            area, low, high, surely = (
                result["matrix"][name][i][j] for name in ("area", "low", "high", "certain")
            )
            assert area == pytest.approx((moved | stays).sum() / 100, abs=1e-3)
            assert surely == pytest.approx((moved & certain).sum() / 100, abs=1e-3)
            assert low <= area <= high
    assert np.sum(result["matrix"]["area"]) == pytest.approx(result["compared"])
    assert result["interval"][0] < result["changed"] < result["interval"][1]


def test_an_interval_is_that_of_resampled_blocks():
    areas = change.Areas("ha", *[np.zeros((100, 1, 1))] * 3)
    by_block = np.random.default_rng(1).exponential(size=(100, 2))
    wanted = by_block.sum(0) + np.outer([-1.96, 1.96], by_block.std(0) * 10)
    np.testing.assert_allclose(areas.interval(by_block), wanted, rtol=0.1)
    np.testing.assert_allclose(areas.interval(np.ones((100, 1))), [[100], [100]])


def test_intervals_have_the_seed_that_is_named(years, tmp_path):
    result = compare(*years[:2], output_dir=tmp_path / "out", seed=1)
    assert result["changed"] == years[-1]["changed"], "all pixels are in the sample"
    assert result["interval"] != years[-1]["interval"]


def test_geotiffs_picture_and_what_they_were_made_from(years):
    before, after, _, folder, _ = years
    for name, no_data in (("change", np.nan), ("changed", 0)):
        array = np.load(folder / f"{name}.npy")
        with rasterio.open(folder / f"{name}.tif") as file:
            np.testing.assert_array_equal(file.read(1), array)
            assert file.crs.to_epsg() == 32631 and file.dtypes == (str(array.dtype),)
            np.testing.assert_equal(file.nodata, no_data)
            unit = "deviations of unchanged pixels" if name == "change" else None
            assert file.units == (unit,)
    codes, colors = (
        np.load(folder / "changed.npy"),
        map_in(folder / "change.png", SHAPE, number=2, count=3),
    )
    assert (colors[codes == 2][5:] == (0xE6, 0x9F, 0x00)).all()
    made_from = json.loads((folder / "change.json").read_text())
    assert made_from["after"]["path"] == str((after / "representation_map.npy").resolve())
    assert made_from["before"]["checkpoint_sha256"] == "a" * 64
    assert made_from["false_alarms"] == 0.01
    np.save(before / "representation_map_scales.npy", np.zeros(1))
    files = change.Years(before, after).describe()["before"]["files"]
    (before / "representation_map_scales.npy").unlink()
    assert {*files} - {*made_from["before"]["files"]} == {"representation_map_scales.npy"}
    assert not list(folder.glob(".*part*"))


def test_both_years_have_colours_of_one_basis(tmp_path):
    """The second year is the first one, moved by 8 columns: so are its colours."""
    values = np.random.default_rng(0).normal(size=(*SHAPE, 4)).cumsum(1)
    folders = [
        write_map(tmp_path / year, np.roll(values, shift, 1), years=year)
        for year, shift in (("2024", 0), ("2025", 8))
    ]
    compare(*folders)
    pictures = [map_in(folders[1] / "change/change.png", SHAPE, number, 3) for number in (0, 1)]
    inside = np.s_[2:-2, 10:-2]
    np.testing.assert_array_equal(np.roll(pictures[0], 8, 1)[inside], pictures[1][inside])
    assert plt.imread(folders[1] / "change/change.png").std() > 0.1


WRONG = {
    "another encoder": ({"checkpoint_sha256": "b" * 64}, "found a map of checkpoint bbbb"),
    "another place": ({"transform": [10, 0, 0, 0, -10, 0]}, "wanted EPSG:32631 .* of the map"),
    "another CRS": ({"crs": "EPSG:32632"}, "found EPSG:32632 "),
    "another shape": (np.s_[:-1], "found 47 x 64 pixels, wanted 48 x 64 as "),
    "other dimensions": (np.s_[..., :5], "found 5 dimensions, wanted 16"),
    "no data": (np.nan, "found 0 valid pixels, wanted more than 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_maps_that_cannot_be_compared_end_in_one_line(tmp_path, name):
    before, after, _ = make_years(tmp_path, classes=False)
    wrong, line = WRONG[name]
    if isinstance(wrong, dict):
        info = json.loads((after / "infer.json").read_text())
        (after / "infer.json").write_text(json.dumps(info | wrong))
    else:
        values = np.load(after / "representation_map.npy")
        values = values[wrong] if name != "no data" else values * np.nan
        np.save(after / "representation_map.npy", values)
    assert str(after if name != "no data" else tmp_path) in refused(line, compare, before, after)
    assert not (after / "change/changed.npy").exists()


def test_the_same_map_twice_or_none_is_refused(tmp_path):
    before, after, _ = make_years(tmp_path, classes=False)
    refused("found the same map twice", compare, before, before / "representation_map.npy")
    np.save(after / "representation_map.npy", np.load(before / "representation_map.npy"))
    refused("found what the other map has, wanted another year", compare, before, after)
    (after / "representation_map.npy").unlink()
    refused("found no such file, wanted a representation map", compare, before, after)


def test_the_truth_is_that_of_the_tiles_where_they_have_it(tmp_path, capsys):
    """changed.npy of the later tile; else labels of both years, by the names of their classes."""
    tiles = [tmp_path / "tiles" / year for year in ("2024", "2025")]
    names = CLASSES, {"1": CLASSES["2"], "2": CLASSES["1"], "7": CLASSES["7"]}
    before, after, truth = make_years(tmp_path, classes=False)
    codes = np.where(truth, 2, 1)
    for tile, folder, table, labels in zip(
        tiles, (before, after), names, (np.ones(SHAPE), 3 - codes), strict=True
    ):
        tile.mkdir(parents=True)
        (tile / "tile.json").write_text(json.dumps({"classes": table, **GEO}))
        labels[:, -1] = 0
        np.save(tile / "labels.npy", labels.astype(np.uint8))
        info = json.loads((folder / "infer.json").read_text())
        (folder / "infer.json").write_text(json.dumps(info | {"tile_path": str(tile)}))
    found = compare(before, after)
    assert found["truth"].startswith("labels of both years")
    known = np.s_[:, :-1]
    is_found = np.load(after / "change/changed.npy") > 1
    rows = np.s_[2:, 1:-1]  # with data
    assert found["scores"]["recall"] == pytest.approx(is_found[rows][truth[rows]].mean())
    np.save(tiles[1] / "changed.npy", truth)
    again = compare(before, after)
    assert again["truth"] == str(tiles[1] / "changed.npy")
    assert again["scores"]["recall"] == pytest.approx(is_found[2:, 1:][truth[2:, 1:]].mean())
    assert "false alarms 0." in capsys.readouterr().out
    np.save(tmp_path / "bad.npy", truth[known])
    refused("bad.npy: found shape", compare, before, after, truth_path=tmp_path / "bad.npy")
    np.save(tmp_path / "bad.npy", truth * 2)
    refused("bad.npy: found values other", compare, before, after, truth_path=tmp_path / "bad.npy")


def test_a_run_that_was_killed_resumes_with_the_same_bytes(years, tmp_path, monkeypatch):
    before, after, _, folder, _ = years
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4 * 64 * 16 * 8)  # 8 rows
    write, written = MapWriter.write, []

    def write_three(writer, rows, blocks):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(rows)
        write(writer, rows, blocks)

    monkeypatch.setattr(MapWriter, "write", write_three)
    keywords = {"output_dir": tmp_path / "out", "truth_path": folder.parent.parent / "truth.npy"}
    with pytest.raises(KeyboardInterrupt):
        compare(before, after, **keywords)
    assert not (tmp_path / "out/changed.npy").exists()
    monkeypatch.setattr(
        MapWriter, "write", lambda *arguments: (written.append(arguments[1]), write(*arguments))
    )
    read, blocks = [], reader.RepresentationMap.blocks
    monkeypatch.setattr(
        reader.RepresentationMap,
        "blocks",
        lambda one, stride=1, start=0: (read.append(start), blocks(one, stride, start))[1],
    )
    compare(before, after, **keywords)
    assert sorted(read)[-2:] == [24, 24], "rows of both maps that are done are not read again"
    assert written == [(row, row + 8) for row in range(0, 48, 8)]
    for name in ("change.npy", "changed.npy", "change.png", "change.json", "changed.tif"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_the_picture_needs_the_colours_of_both_years_only(tmp_path, monkeypatch):
    """Regression: it held the representations of both years, of any size."""
    monkeypatch.setattr(reader, "BLOCK_BYTES", 1 << 19)
    values = np.random.default_rng(0).normal(size=(200, 100, 64)).astype(np.float32)
    years = change.Years(*(write_map(tmp_path / year, values) for year in "ab"))
    basis, codes = fit_basis(values.reshape(-1, 64)), np.zeros((200, 100), np.uint8)
    monkeypatch.setattr(compare_years, "draw_maps", lambda panels, *_: panels)
    tracemalloc.start()
    panels = compare_years.draw_change(years, codes, basis)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [*panels] == ["before", "after", "change"]
    assert peak < values.nbytes, "of two maps that are this size each"


def test_the_picture_may_be_an_svg(years, tmp_path):
    compare(*years[:2], output_dir=tmp_path / "out", format="svg")
    assert [path.name for path in (tmp_path / "out").glob("change.[ps]*g")] == ["change.svg"]


@pytest.mark.slow
def test_the_picture_is_logged_to_wandb(years, tmp_path):
    before, after = years[:2]
    out = tmp_path / "out"
    compare(before, after, output_dir=out, wandb_mode="offline", wandb_dir=out)
    assert_pictures_logged(out)
