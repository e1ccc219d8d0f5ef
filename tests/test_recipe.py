"""What pretraining takes from the data: the dates of a view, and how long it is."""

from running.checkpoints import load_checkpoint
from running.errors import InputError

import numpy as np
import pytest
from helpers import make_dataset, tile_of, tiny

import train
from data import SentinelTimeSeriesDataset
from training.recipe import LEAST, MOST, Recipe, fill_in, read_recipe

AUTO = {"sample_size": 0, "min_sample_size": 0, "min_samples": 0}


def test_the_recipe_counts_the_clear_dates_of_training_pixels(tmp_path):
    """By a plain loop over all tiles; pixels of other splits do not count."""
    base_path = make_dataset(tmp_path, tiles=2)
    dataset = SentinelTimeSeriesDataset(base_path, "toy", split="train", block_size=4, min_valid=5)
    counts = []
    for index in range(len(dataset.tiles)):
        clear = np.load(tile_of(base_path, index) / "masks.npy").sum(0)
        counts += clear[dataset.pixel_mask(index)].tolist()
    found = read_recipe(dataset)
    assert found.observations == sum(counts)
    assert sum(count >= found.dates for count in counts) >= 0.75 * len(counts)
    assert sum(count > found.dates for count in counts) <= 0.75 * len(counts)


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        (Recipe(50, 127_000), (16, 8, MOST)),  # many dates: views of 16
        (Recipe(17, 29_739), (8, 4, 297_390)),  # few dates: half of them
        (Recipe(3, 500), (2, 2, LEAST)),  # hardly any
        (Recipe(1, 500), (2, 2, LEAST)),
    ],
)
def test_few_dates_make_short_views_and_few_observations_a_short_training(recipe, sizes):
    filled = fill_in(train.run_config, recipe)
    assert tuple(filled[key] for key in AUTO) == sizes


def test_keys_that_are_given_win_over_the_data():
    given = {**train.run_config, "sample_size": 10, "min_sample_size": 2, "min_samples": 77}
    filled = fill_in(given, Recipe(50, 127_000))
    assert filled == given
    with pytest.raises(TypeError, match="assignment"):
        filled["seed"] = 1  # frozen, as it came
    single = fill_in({**train.run_config, "sample_size": 1}, Recipe(50, 127_000))
    assert single["min_sample_size"] == 1, "no view is longer than sample_size"
    shorter = {**train.run_config, "max_samples": 5000}
    assert fill_in(shorter, Recipe(50, 127_000))["min_samples"] == 5000


def test_a_training_prints_and_keeps_what_followed_from_the_data(tmp_path, capsys):
    """The checkpoint has the numbers, not 0: later scripts and a resumed run read them."""
    base_path = make_dataset(tmp_path)
    config = tiny(base_path, tmp_path / "out", **AUTO, max_steps=4)
    train.main(config)
    kept = load_checkpoint(tmp_path / "out/last.pt")["config"]
    assert kept["sample_size"] > 0 and kept["min_sample_size"] > 0 and kept["min_samples"] > 0
    printed = capsys.readouterr().out
    assert f"views of {kept['min_sample_size']} to {kept['sample_size']} clear dates" in printed
    assert train.main({**config, "max_steps": 6})["step"] == 6
    with pytest.raises(InputError, match="sample_size"):
        train.main({**config, "max_steps": 6, "sample_size": kept["sample_size"] + 1})


def test_views_of_a_started_encoder_follow_the_new_data(tmp_path, capsys):
    """A general encoder had views of 16 dates; a region of few dates needs shorter ones."""
    base_path = make_dataset(tmp_path)
    train.main(tiny(base_path, tmp_path / "first", max_steps=2, sample_size=12))
    start = {"checkpoint_path": str(tmp_path / "first/last.pt")}
    train.main(tiny(base_path, tmp_path / "second", max_steps=2, **AUTO, **start))
    assert load_checkpoint(tmp_path / "second/last.pt")["config"]["sample_size"] < 12
    train.main(tiny(base_path, tmp_path / "mlp", max_steps=2, sample_size=7, backbone="mlp"))
    start = {"checkpoint_path": str(tmp_path / "mlp/last.pt")}
    train.main(tiny(base_path, tmp_path / "again", max_steps=2, **AUTO, **start))
    assert load_checkpoint(tmp_path / "again/last.pt")["config"]["sample_size"] == 7
    assert "views of 7 to 7 clear dates" in capsys.readouterr().out, "an mlp reads all of them"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("arkansas_2021", (13, 6, 1_000_000)),
        ("caatinga_2025", (8, 4, 297_390)),
        ("pyrenees_2023", (7, 4, 100_000)),
    ],
)
def test_the_recipe_of_real_sets_is_the_one_that_was_measured(shared, name, sizes):
    dataset = SentinelTimeSeriesDataset(shared, name, split="train")
    filled = fill_in(train.run_config, read_recipe(dataset))
    assert tuple(filled[key] for key in AUTO) == sizes
