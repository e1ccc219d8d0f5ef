"""The study of recipes: runs that train and score, what is not done again, and its table."""

import json

import pytest
import study
from helpers import lines, make_dataset, run

import train
from evaluation import classifiers
from running.errors import InputError

TINY = {"width": 16, "depth": 1, "latent_dim": 16, "val_pixels": 256, "max_steps": 2}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that runs the study on a toy data set and returns the rows of its results."""
    make_dataset(tmp_path, shape=(20, 48, 48, 10))
    monkeypatch.setitem(study.RECIPES, "tiny", TINY)
    monkeypatch.setattr(study, "COUNTS", {20: 1})
    monkeypatch.setattr(classifiers, "REPEATS", 1)  # of the folds, which is faster

    def start(results="results.jsonl", **keywords):
        paths = {"base_path": tmp_path, "results": tmp_path / results, "weights": tmp_path / "out"}
        run(study, **paths, sets="toy", **keywords)
        return [json.loads(line) for line in (tmp_path / results).read_text().splitlines()]

    return start


def test_a_run_is_done_once(start, tmp_path, monkeypatch):
    rows = start(recipes="series,tiny")
    assert [row["recipe"] for row in rows] == ["series", "tiny"]
    assert rows[1]["overrides"] == TINY
    for row in rows:
        assert 0 <= row["scores"]["20"] <= 1
        assert 0 <= row["discriminant"]["20"] <= 1
    assert start(recipes="series,tiny") == rows
    # a recipe that was changed is another one
    monkeypatch.setitem(study.RECIPES, "tiny", {**TINY, "max_steps": 1})
    assert len(start(recipes="tiny")) == 3
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_kept_encoder_is_scored_without_a_training(start, tmp_path, monkeypatch):
    (row,) = start(recipes="tiny")
    (folder,) = (tmp_path / "out").iterdir()
    assert [line["step"] for line in lines(folder)] == [0, 2]
    monkeypatch.setattr(train, "train_step", None)
    (again,) = start(results="again.jsonl", recipes="tiny")
    assert row.pop("train_seconds") > 0
    assert again == row


def test_the_published_rows_make_a_table(capsys):
    """Also those of recipes that study.py had before."""
    run(study, summary=True, recipes="sizes,half + mlp")
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| recipe | gain | arkansas_2021 |")
    assert [row.split(" | ")[0] for row in rows] == ["| predict", "| sizes", "| half + mlp"]
    with pytest.raises(InputError, match="found no recipe 'none', wanted some of"):
        run(study, summary=True, recipes="none")
