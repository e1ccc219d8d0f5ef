"""model_card.md: what a run knows of its best.pt, and nothing else."""

import json
import re
import shlex

from running.checkpoints import load_checkpoint
from running.config import override
from running.files import file_hash

import numpy as np
import pytest
import yaml
from helpers import (
    assert_same_weights,
    fine_tune,
    lines,
    make_dataset,
    tile_of,
    tiny,
    weights,
)

import train
from tiles import TRAIN, Tile
from trained import card


@pytest.fixture(scope="module")
def cards(workplace):
    return {
        kind: (workplace / kind / "model_card.md").read_text()
        for kind in ("pretrained", "classifier")
    }


def cell(text, name):
    """What a row of a card's tables has in its second column."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*?) \|", text, re.MULTILINE)
    return found


def test_a_card_names_the_file_and_its_data(workplace, cards):
    for kind, text in cards.items():
        assert f"SHA-256 `{file_hash(workplace / kind / 'best.pt')}`" in text
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["library_name"] == "pytorch"
        assert "sentinel-2" in head["tags"]
        assert cell(text, "tiles") == "2: MGRS-0, MGRS-1"
        # 24 x 16 pixels of 10 m west and south of a corner of zone 31, at its central meridian
        assert cell(text, "region").startswith("longitude 3.0000 to 3.0022, latitude 48.7509 to")
        assert cell(text, "bands").startswith("X0, X1")
        assert "years not recorded" in cell(text, "dates")
        assert "Code: MIT. Data, as in `tile.json`: not recorded." in text
    assert cell(cards["classifier"], "pixels") == "448 training, 192 validation, 128 test"
    assert cell(cards["pretrained"], "pixels") == "448 training, 192 validation"


def test_scores_are_those_of_the_run(workplace, cards):
    scores = json.loads((workplace / "classifier/metrics.json").read_text())
    text = cards["classifier"]
    assert cell(text, "macro-F1, test pixels") == f"{scores['macro_f1']:.4g}"
    for code, row in scores["per_class"].items():
        numbers = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        assert f"| {code} | {row['name']} | {numbers} | {row['support']} |" in text
    last = lines(workplace / "pretrained")[-1]
    assert cell(cards["pretrained"], "validation loss") == f"{last['val_loss']:.4g}"
    assert cell(cards["pretrained"], "steps") == "8; best.pt is of step 8"


def test_the_command_of_a_card_makes_the_same_run(workplace, cards, tmp_path):
    command = re.search(r"```bash\n(.*?)```", cards["pretrained"], re.DOTALL)[1]
    program, script, *words = shlex.split(command.replace("\\\n", " "))
    assert (program, script) == ("python", "train.py")
    train.main(override(train.run_config, [*words, f"output_dir={tmp_path}"]))
    # the fixture may have had more threads
    assert_same_weights(weights(tmp_path), weights(workplace / "pretrained"), atol=1e-4, rtol=0)


def test_a_card_says_what_tiles_say(tmp_path):
    """Dates, a licence, that tiles are simulated; and that there is no place."""
    dates = [f"2021-{month:02}-{day:02}" for month in range(1, 11) for day in (3, 20)]
    info = {"dates": dates, "license": "CC-BY-4.0", "simulated": True}
    make_dataset(tmp_path, **info)
    train.main(tiny(tmp_path, tmp_path / "out", max_steps=2, backbone="mlp"))
    text = (tmp_path / "out/model_card.md").read_text()
    assert cell(text, "dates").startswith("2021-01-03 to 2021-10-20; days of year ")
    assert cell(text, "region").startswith("not recorded")
    assert "Data, as in `tile.json`: CC-BY-4.0." in text
    assert "Tiles are simulated" in text
    tile = Tile(tile_of(tmp_path))
    inside = [date for date, day in zip(dates, tile.doys, strict=True) if 60 <= day <= 200]
    tile.choose_dates(60, 200)
    assert card.describe_dates([tile]).startswith(f"{inside[0]} to {inside[-1]}; days of year ")
    assert 0 < len(inside) < len(dates)


def test_intervals_where_there_are_any():
    best = {"target": {"unit": "t/ha"}}
    scores = {"rmse": 2.5, "r2": np.float64(0.5), "intervals": {"rmse": [2.25, 3.0]}, "mae": None}
    text = card.describe_scores(best, scores)
    assert "| RMSE, test pixels | 2.5 t/ha | 2.25 to 3 |" in text
    assert "| R2, test pixels | 0.5 | not measured |" in text
    assert "absolute" not in text


def test_a_card_of_a_season_that_starts_from_an_encoder(workplace, tmp_path, monkeypatch):
    """Settings, steps, the pixels that were read, and what limits the checkpoint."""
    monkeypatch.setattr(card, "NAMED", 1)
    fine_tune(workplace, tmp_path, epochs=3, start="40", end="300", min_valid=6, seed=3)
    text, best = (tmp_path / "model_card.md").read_text(), load_checkpoint(tmp_path / "best.pt")
    assert cell(text, "tiles") == "2: MGRS-0 and 1 more"
    assert "A pixel with fewer than 6 clear observations has no embedding." in text
    assert "It reads days of year 40 to 300 alone." in text
    assert "nothing else has looked at them" in text
    assert cell(text, "learning_rate") == "0.001" and cell(text, "head") == "linear"
    assert cell(text, "splits") == "blocks of 4 pixels, split_seed=0"
    steps = len(lines(tmp_path)) and load_checkpoint(tmp_path / "last.pt")["step"]
    assert cell(text, "steps") == f"{steps}; best.pt is of step {best['step']}"
    tiles = [Tile(tile_of(workplace, number)) for number in range(2)]
    observations = 0
    for tile in tiles:
        tile.choose_dates(40, 300)
        counts = tile.clear_counts()
        is_read = (tile.split_map(4) == TRAIN) & (counts >= 6) & (tile.labels > 0)
        observations += int(counts[is_read].sum())
    assert cell(text, "clear observations") == f"{observations} of the training pixels"
    days = np.concatenate([tile.doys for tile in tiles])
    assert f"days of year {days.min()} to {days.max()}" in cell(text, "dates")


def test_a_card_of_an_encoder_says_which_pixels_chose_it(cards):
    assert (
        "Its scores are of validation pixels, which also chose this checkpoint."
        in (cards["pretrained"])
    )
