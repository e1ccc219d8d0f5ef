"""The stream of batches that is drawn from tiles, and the splits and labels in it."""

from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import make_dataset, make_tile, pixel_ids, save

import data
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from tiles import TEST, Bands, Tile, open_dataset

ZERO, ONE = np.zeros(10, np.float32), np.ones(10, np.float32)  # leave the values as stored
RAW = {"bands": Bands([], ZERO, ONE, "this test")}


def batches(base_path, name="toy", workers=0, kind=SentinelTimeSeriesDataset, **keywords):
    dataset = kind(base_path, name, **{"min_valid": 5, "sample_size": 8, **RAW, **keywords})
    return list(iterate_batches(dataset, workers))


def test_groups_are_the_blocks_of_the_split(tmp_path):
    """Regression: cut from the tile's corner, the groups divided blocks of the map grid.

    So cross-validation and the bootstrap took parts of one block for independent.
    """
    place = {"crs": "EPSG:32631", "transform": [10, 0, 500030, 0, -10, 5400050]}
    base_path = make_dataset(tmp_path, tiles=1, shape=(12, 40, 40, 10), clear=0.9, **place)
    kind = SentinelTimeSeriesDatasetForDownstreaming
    dataset = kind(base_path, "toy", split="test", min_valid=5, block_size=8, batch_size=1 << 20)
    (_, _, _, groups), tile = next(iterate_batches(dataset)), dataset.tiles[0]
    rows, columns = tile.block_numbers(8)
    row, column = np.nonzero(dataset.pixel_mask(0))
    wanted = rows[row] * 1000 + columns[column]
    sizes = [np.sort(np.unique(each, return_counts=True)[1]) for each in (groups, wanted)]
    assert sizes[0].tolist() == sizes[1].tolist()
    assert rows[7] != rows[0], "the grid does not begin at this tile's corner"
    folder = base_path / "data/toy/processed"
    for name, info in (("MGRS-1", place), ("MGRS-2", place | {"crs": "EPSG:32632"})):
        make_tile(folder / name, (12, 40, 40, 10), clear=0.9, **info)
    dataset = kind(base_path, "toy", split="test", min_valid=5, block_size=8, batch_size=1 << 20)
    *_, both = next(iterate_batches(dataset))
    row, column = np.nonzero(dataset.tiles[2].split_map(8) == 3)
    other_zone = np.unique(rows[row] * 1000 + columns[column])
    assert set(groups.tolist()) < set(both.tolist()), "the same ground in another year"
    assert len(np.unique(both)) == len(np.unique(groups)) + len(other_zone)


# ---- stream --------------------------------------------------------------------------------------


def test_batches_come_out_ready(dataset):
    x, doys = batches(dataset, batch_size=100)[0]
    assert x.shape[1:] == (2, 8, 10)
    assert doys.shape == x.shape[:3]
    assert x.dtype == torch.float32
    assert (doys.diff(dim=-1) > 0).all()


def test_bands_travel_as_they_are_stored(dataset):
    """Half the bytes of float32 between processes and to a GPU; standardised where they arrive."""
    views = SentinelTimeSeriesDataset(dataset, "toy", batch_size=100)
    (bands, doys), (x, same_doys) = next(iter(views)), next(iterate_batches(views))
    assert bands.dtype == torch.uint16
    assert doys.equal(same_doys)
    wanted = (bands.float() - views.mean) / views.std
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


def test_values_belong_to_clear_observations_of_one_pixel_and_their_days(dataset):
    tiles = open_dataset(dataset, "toy")
    for x, doys in batches(dataset, batch_size=100):
        date = (x[..., 0] - 1000).long()  # (N, 2, S)
        pixel = pixel_ids(x)
        assert (x[..., -1] == x[..., :1, :1, -1]).all(), "dates of several pixels in one series"
        for n in range(0, len(x), 7):
            matches = [
                tile
                for tile in tiles
                if (tile.doys[date[n]] == doys[n].numpy()).all()
                and tile.masks.reshape(20, -1)[date[n], pixel[n]].all()
            ]
            assert matches


@pytest.mark.parametrize("batch_size", [7, 100, 512, 10_000])
def test_every_valid_pixel_once_an_epoch(tmp_path, batch_size):
    """Guards against samples lost where a buffer is full or an epoch ends."""
    base_path = make_dataset(tmp_path, tiles=1, clear=0.4)
    valid = open_dataset(base_path, "toy")[0].masks.sum(0).ravel() >= 8
    assert 0 < valid.sum() < valid.size
    for epoch in range(2):
        dataset = SentinelTimeSeriesDataset(
            base_path, "toy", min_valid=8, batch_size=batch_size, **RAW
        )
        steps = dataset.steps_per_epoch
        dataset.set_steps(epoch * steps, (epoch + 1) * steps)
        drawn = [x for x, _ in iterate_batches(dataset)]
        assert len(drawn) == steps
        assert max(map(len, drawn)) <= batch_size
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
        seen = torch.cat([pixel_ids(x) for x in drawn]).sort().values
        assert seen.tolist() == np.flatnonzero(valid).tolist()


def equal(one, other):
    assert len(one) == len(other)
    for some, more in zip(one, other, strict=True):
        assert all(a.equal(b) for a, b in zip(some, more, strict=True))


def test_batches_are_a_function_of_seed_epoch_and_step(dataset, monkeypatch):
    """The same with 0, 1, 2 workers, resumed anywhere, and put together from 3 processes."""
    monkeypatch.setattr(data, "CHUNK_PIXELS", 640)  # several chunks in an epoch
    monkeypatch.setattr(data, "BLOCK_PIXELS", 32)
    whole = SentinelTimeSeriesDataset(dataset, "toy", batch_size=50, **RAW)
    last = 3 * whole.steps_per_epoch
    whole.set_steps(0, last)
    wanted = list(iterate_batches(whole))
    assert len(wanted) == last
    for workers in (1, 2):
        equal(list(iterate_batches(whole, workers)), wanted)
    for first in (1, whole.steps_per_epoch, 2 * whole.steps_per_epoch - 1):
        whole.set_steps(first, last)
        equal(list(iterate_batches(whole)), wanted[first:])
    ranks = []
    for rank in range(3):
        part = SentinelTimeSeriesDataset(dataset, "toy", batch_size=50, process=(rank, 3), **RAW)
        part.set_steps(0, last)
        ranks.append(list(iterate_batches(part, 2)))
    together = [data._join(parts) for parts in zip(*ranks, strict=True)]
    equal(together, wanted)


def test_epochs_seeds_and_views_differ(tmp_path):
    """Guards against one seed for all, so that every worker and epoch draws the same views."""
    base_path = make_dataset(tmp_path, tiles=1)
    keywords = {"batch_size": 1000, "min_valid": 10, "sample_size": 5}
    stream = SentinelTimeSeriesDataset(base_path, "toy", **keywords, **RAW)
    stream.set_steps(0, 2)
    (x, _), (again, _) = iterate_batches(stream, 2)
    other = batches(base_path, seed=1, **keywords)[0][0]
    assert not pixel_ids(x).equal(pixel_ids(again)), "the same order"

    def dates(batch):
        return batch[pixel_ids(batch).argsort()][..., 0]

    for one, two in ((x, again), (x, other), (x[:, :1], x[:, 1:])):
        assert (dates(one) != dates(two)).flatten(1).any(1).float().mean() > 0.95


def test_batches_mix_all_tiles_and_places(tmp_path):
    base_path = make_dataset(tmp_path, tiles=4)
    tiles = [set(tile.doys.tolist()) for tile in open_dataset(base_path, "toy")]
    for x, doys in batches(base_path, batch_size=128):
        from_tile = [sum(set(row.tolist()) <= days for row in doys[:, 0]) for days in tiles]
        assert min(from_tile) > 10, from_tile
        assert len(pixel_ids(x).div(16, rounding_mode="floor").unique()) > 8


def test_few_observations_are_repeated(tmp_path):
    base_path = make_dataset(tmp_path, tiles=1, shape=(5, 8, 8, 10), clear=1.0)
    x, doys = batches(base_path, sample_size=12)[0]
    assert x.shape == (64, 2, 12, 10)
    assert all(len(row.unique()) == 5 for row in doys.flatten(0, 1))


def test_min_valid_that_no_pixel_meets(dataset):
    with pytest.raises(InputError, match=r"at least min_valid=21 .* clearest pixel has (20|19)"):
        batches(dataset, min_valid=21)


def test_no_whole_tile_in_memory(tmp_path, monkeypatch):
    """Pixels are read in parts: no read copies more than the parts that fit a cache."""
    base_path = make_dataset(tmp_path, tiles=1, shape=(10, 64, 16, 10))
    monkeypatch.setattr(data, "SAMPLE_PIXELS", 64)
    sizes, read_dates = [], Tile.read_dates

    def read(tile, pixels, dates):
        sizes.append(len(pixels))
        return read_dates(tile, pixels, dates)

    monkeypatch.setattr(Tile, "read_dates", read)
    assert sum(len(x) for x, _ in batches(base_path, batch_size=200)) > 500
    assert max(sizes) < 128


def test_batches_do_not_depend_on_how_many_pixels_are_drawn_at_once(dataset, monkeypatch):
    whole = batches(dataset, batch_size=50)
    monkeypatch.setattr(data, "SAMPLE_PIXELS", 1)
    for (x, doys), (x_whole, doys_whole) in zip(
        batches(dataset, batch_size=50), whole, strict=True
    ):
        assert x.equal(x_whole)
        assert doys.equal(doys_whole)


def test_no_two_chunks_draw_with_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_PIXELS", 64)
    base_path = make_dataset(tmp_path, clear=1.1)
    draws = torch.cat([doys[:, 0] for _, doys in batches(base_path, batch_size=64)])
    assert len(draws.unique(dim=0)) > 0.95 * len(draws), "of 125970 subsets of 20 dates each"


def test_a_part_of_the_batch_may_be_empty(dataset):
    """Fewer pixels than shards: some processes have none, and take part all the same."""
    few = {"kind": SentinelTimeSeriesDatasetForDownstreaming, "label_count": 5}
    parts = [batches(dataset, process=(rank, 64), **few)[0] for rank in range(64)]
    assert sum(len(part[0]) for part in parts) == 5
    assert {part[0].shape[2] for part in parts} == {10}


def test_a_part_of_a_labelled_batch_may_be_empty_and_has_its_dates(dataset):
    """Regression: An MLP or a CNN cannot read pixels of no date: torchrun ended in a traceback."""
    kind = SentinelTimeSeriesDatasetForDownstreaming
    keywords = {"kind": kind, "sample_size": 8, "batch_size": 2, "block_size": 4}
    shapes = {tuple(x.shape) for x, *_ in batches(dataset, process=(3, 16), **keywords)}
    assert (0, 8, 10) in shapes
    assert {shape[1:] for shape in shapes} == {(8, 10)}


def test_labels_that_splits_leave_unused_are_not_probed(tmp_path):
    base_path = make_dataset(tmp_path, tiles=1, clear=1.0)
    tile = base_path / "data/toy/processed/MGRS-0"
    splits = np.full((16, 16), 2, np.uint8)
    splits[:4] = 0
    save(tile, "splits", splits)
    assert ids_of_split(base_path, "train+validation") == set(range(64, 256))
    everything = ids_of_split(base_path, "train+validation", SentinelTimeSeriesDataset)
    assert everything == set(range(256))


def test_real_tiles(shared):
    for name in ("arkansas_2021", "flanders_2018", "bouconne_2018", "slovenia_2017"):
        stream = SentinelTimeSeriesDataset(shared, name, min_valid=5)
        x, doys = next(iter(iterate_batches(stream)))
        assert x.shape[1:3] == doys.shape[1:] == (2, 16)
        assert abs(float(x.mean())) < 0.5
        assert 0.4 < float(x.std()) < 1.5


# ---- splits and labels ---------------------------------------------------------------------------


def ids_of_split(base_path, split, kind=SentinelTimeSeriesDatasetForDownstreaming, **keywords):
    drawn = batches(base_path, kind=kind, split=split, block_size=4, **keywords)
    return set(torch.cat([pixel_ids(batch[0]) for batch in drawn]).tolist())


@pytest.mark.parametrize("splits_file", [True, False])
def test_splits_are_disjoint(tmp_path, splits_file):
    """Validation must not see training pixels, nor the test split those that chose the model."""
    base_path = make_dataset(tmp_path, tiles=1, clear=1.0)
    if splits_file:
        splits = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
        save(base_path / "data/toy/processed/MGRS-0", "splits", splits)
    train, validation, test = (ids_of_split(base_path, s) for s in ("train", "validation", "test"))
    assert len(train) + len(validation) + len(test) == len(train | validation | test)
    unlabelled = ids_of_split(base_path, "train", SentinelTimeSeriesDataset)
    assert unlabelled.isdisjoint(validation | test)
    assert train <= unlabelled
    assert min(len(train), len(validation), len(test)) > 10


@pytest.mark.parametrize("labels", [True, False])
def test_an_unlabelled_tile_trains_on_no_ground_that_another_one_tests(tmp_path, labels):
    """Regression: it trained on blocks that a labelled year of the same place tests on."""
    place = {"crs": "EPSG:32631", "transform": [10, 0, 500_000, 0, -10, 5_400_000]}
    folder = tmp_path / "data/toy/processed"
    for name, labelled in (("MGRS-2020", False), ("MGRS-2021", labels)):
        make_tile(folder / name, clear=1.0, labels=labelled, **place)
    tested = np.flatnonzero(Tile(folder / "MGRS-2020").split_map(4) == TEST)
    trained = ids_of_split(tmp_path, "train", SentinelTimeSeriesDataset)
    assert trained.isdisjoint(tested.tolist()) == labels


def test_the_labelled_data_set_needs_labels(tmp_path):
    base_path = make_dataset(tmp_path, labels=False)
    with pytest.raises(InputError, match=r"no labels.npy"):
        ids_of_split(base_path, "train")


def test_labels_are_the_codes_of_the_tile(tmp_path):
    """Label 0 means no label and is no class; a code such as 95 stays itself."""
    base_path = make_dataset(tmp_path, tiles=1, clear=1.0)
    tile = base_path / "data/toy/processed/MGRS-0"
    labels = np.load(tile / "labels.npy")
    labels[:, :5] = 0
    save(tile, "labels", labels)
    kind = SentinelTimeSeriesDatasetForDownstreaming
    for sample_size in (0, 8):
        for x, _, label, _ in batches(base_path, kind=kind, sample_size=sample_size, block_size=4):
            assert label.tolist() == labels.ravel()[pixel_ids(x)].tolist()
            assert set(label.tolist()) <= {40, 95}


def test_all_clear_observations_in_order(dataset):
    tiles = open_dataset(dataset, "toy")
    kind = SentinelTimeSeriesDatasetForDownstreaming
    for x, doys, *_ in batches(dataset, kind=kind, sample_size=0, workers=2, block_size=4):
        count = (doys > 0).sum(1)
        assert count.max() == doys.shape[1], "padded further than the longest series"
        for n in range(0, len(x), 9):
            pixel = pixel_ids(x)[n]
            wanted = [
                tile.doys[tile.masks.reshape(20, -1)[:, pixel] > 0].tolist() for tile in tiles
            ]
            assert doys[n, : count[n]].tolist() in wanted


def test_label_count_draws_so_many_by_seed(dataset):
    def draw(seed):
        kind = SentinelTimeSeriesDatasetForDownstreaming
        drawn = batches(dataset, kind=kind, label_count=30, seed=seed, block_size=4)
        return torch.cat([pixel_ids(batch[0]) for batch in drawn]).sort().values

    assert len(draw(0)) == 30
    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    with pytest.raises(InputError, match="wanted label_count=9999"):
        batches(
            dataset, kind=SentinelTimeSeriesDatasetForDownstreaming, label_count=9999, block_size=4
        )


@pytest.mark.parametrize("name", ["bands", "masks"])
def test_a_tile_that_is_replaced_between_two_chunks_is_refused(dataset, monkeypatch, name):
    """Whoever reads the batches: training, fine-tuning or label efficiency."""
    monkeypatch.setattr(data, "CHUNK_PIXELS", 64)
    stream = iter(SentinelTimeSeriesDatasetForDownstreaming(dataset, "toy", batch_size=32))
    next(stream)
    file = dataset / f"data/toy/processed/MGRS-0/{name}.npy"
    np.save(file.with_name("new.npy"), np.load(file))
    file.with_name("new.npy").replace(file)
    with pytest.raises(InputError, match=f"{name}.npy: found that it changed while it was read"):
        list(stream)
