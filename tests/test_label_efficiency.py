"""label_efficiency.py: scores of the encoder beside baselines, for each number of labels."""

import json
import re
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

from running.checkpoints import load_checkpoint
from running.errors import InputError, notice
from running.files import lock_folder

import numpy as np
import pytest
import torch
from helpers import (
    GEOREFERENCE,
    Fork,
    as_arguments,
    make_dataset,
    run,
    save,
    save_small_checkpoint,
    tile_of,
)

import label_efficiency
import train_classification
from evaluation import classifiers, comparison, tasks
from evaluation.rows import MODELS, NETWORKS, OWN
from tiles import Tile

QUICK = "embedding,harmonic"


@pytest.fixture(autouse=True)
def quick_choice(monkeypatch):
    """Settings are chosen with fewer folds and trees, which takes a tenth of the time."""
    monkeypatch.setattr(classifiers, "FOLDS", 2)
    monkeypatch.setattr(classifiers, "REPEATS", 1)
    monkeypatch.setattr(classifiers, "SEARCH_TREES", 10)


def score(workplace, output_dir, **keywords):
    """What main returns for the pretrained encoder of the fixture `workplace`."""
    standard = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    standard |= {"dataset_name": "toy", "output_dir": output_dir, "models": QUICK, "seeds": 2}
    return run(label_efficiency, **standard | keywords)


@pytest.mark.slow
def test_compares_with_baselines(workplace, tmp_path, capsys):
    fast = [name for name in MODELS if name not in NETWORKS]
    result = score(workplace, tmp_path / "out", label_counts="20,60", models="fast")
    rows = [(row["label_count"], row["seed"], row["model"]) for row in result["scores"]]
    assert rows == [(count, seed, name) for count in (20, 60) for seed in (0, 1) for name in fast]
    assert all(0 <= row["macro_f1"] <= 1 for row in result["scores"])
    assert [(t["label_count"], t["model"]) for t in result["tests"]] == [
        (count, name) for count in (20, 60) for name in fast if name in OWN
    ]
    for test in result["tests"]:
        mean = {
            name: np.mean(
                [
                    row["macro_f1"]
                    for row in result["scores"]
                    if (row["label_count"], row["model"]) == (test["label_count"], name)
                ]
            )
            for name in fast
        }
        assert mean[test["baseline"]] == max(mean[name] for name in fast if name not in OWN)
        assert test["difference"] == pytest.approx(mean[test["model"]] - mean[test["baseline"]])
        assert test["blocks"] > 1
        low, high = test["interval_blocks"]
        assert low <= high
    for name in ("embedding", "untrained", "series", "harmonic"):
        assert len(result["retrieval"][name]) == 1
        assert 0 <= result["retrieval"][name][0] <= 1
    assert 1 <= result["rankme"]["embedding"][0] <= 16
    assert json.loads((tmp_path / "out/label_efficiency.json").read_text()) == json.loads(
        json.dumps(result)
    )
    table = (tmp_path / "out/label_efficiency.md").read_text()
    for name in fast:
        assert re.search(rf"\| {re.escape(MODELS[name].label)} \| [01]\.\d+ ± 0\.\d+ \| ", table)
    assert (tmp_path / "out/label_efficiency.png").read_bytes()[:4] == b"\x89PNG"
    captured = capsys.readouterr()
    assert "\r" not in captured.out + captured.err, "a clean log file"
    assert table in captured.out
    names = {MODELS[name].label for name in fast}
    assert set(result["rows"].values()) == names
    compared = re.findall(r"^\| \d+ \| ([^|]+) \| ([^|]+) \| [+-]", table, flags=re.MULTILINE)
    assert len(compared) == len(result["tests"])
    assert {name for pair in compared for name in pair} <= names, "no second set of names"
    features = re.findall(r"^\| ([^|]+) \| [01]\.\d+ \|", table, flags=re.MULTILINE)
    assert len(features) == 4
    assert all(any(name.startswith(one) for name in names) for one in features)
    assert re.search(r"\nMacro-F1 is over 2 classes\.\nC, k and leaf size: chosen over", table)
    assert "Found again: share of" in table
    assert "RankMe: how many dimensions an encoder uses, 1 to 16" in table


def run_forked(command, **_):
    """What subprocess.run gives of train_classification.py, which has everything imported."""
    process = Fork(*command[2:], script=train_classification)
    stdout, stderr = process.communicate()
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


@pytest.mark.slow
def test_networks_see_the_labels_and_test_pixels_of_the_others(workplace, tmp_path, monkeypatch):
    """Rows of one table that were trained or scored on other pixels cannot be compared."""
    trained = []
    train_network = comparison.train_network

    def spy(*arguments):
        content = train_network(*arguments)
        trained.append((content, sorted(path.name for path in (tmp_path / "out").iterdir())))
        return content

    monkeypatch.setattr(comparison, "train_network", spy)
    monkeypatch.setattr("subprocess.run", run_forked)
    result = score(
        workplace, tmp_path / "out", models="finetuned,scratch", seeds=2, label_counts="30"
    )
    assert [row["model"] for row in result["scores"]] == ["finetuned", "scratch"] * 2
    checkpoint = load_checkpoint(workplace / "pretrained/best.pt")
    config = {**label_efficiency.run_config, "base_path": workplace, "dataset_name": "toy"}
    for place, (content, _) in enumerate(trained):
        for split, name, count in (("train", "training", 30), ("test", "test", 0)):
            dataset = label_efficiency.open_split(split, checkpoint, config, count, place // 2)
            assert content["data"][name]["tiles"] == dataset.describe()["tiles"]
    for content, files in trained:
        sizes = {key: content["backbone"][key] for key in ("name", "width", "depth", "latent_dim")}
        assert sizes.items() <= checkpoint["backbone"].items(), "the same architecture"
        assert content["config"]["sample_size"] == 0, "both read all dates"
        assert ".network" not in files, "its folder is removed"
    assert [bool(content["config"]["checkpoint_path"]) for content, _ in trained] == [
        True,
        False,
    ] * 2


@pytest.mark.slow
def test_sigterm_ends_the_training_of_a_network_too(workplace, tmp_path):
    """Regression: the network kept training alone, with all its memory, and its folder stayed."""
    out = tmp_path / "out"
    config = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    config |= {"dataset_name": "toy", "output_dir": out, "models": "scratch", "seeds": 50}
    config |= {"label_counts": "0", "wandb_mode": "disabled", "device": "cpu"}
    process = Fork(*as_arguments(config, label_efficiency), script=label_efficiency)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (out / ".network/metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    (child,) = children.read_text().split()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert not (out / ".network").exists()
    assert not Path(f"/proc/{child}").exists()


def test_label_draws_of_all_labels_are_one_draw(workplace, tmp_path):
    """Regression: the same labels and encoder three times gave a spread of 0 and a tiny p."""
    keywords = {"models": "discriminant,harmonic_discriminant", "seeds": 3}
    result = score(workplace, tmp_path, label_counts="30,0", **keywords)
    few, everything = result["tests"]
    assert few["p_seeds"] is not None
    assert everything["label_count"] == result["all_labels"] > 30
    assert everything["p_seeds"] is None
    row = re.search(r"\| embedding \+ disc.*", (tmp_path / "label_efficiency.md").read_text())[0]
    assert re.fullmatch(r"\| embedding .*? \| 0\.\d+ ± 0\.\d+ \| [01]\.\d+ \|", row)


def test_one_count_is_plotted_with_the_names_of_its_lines(workplace, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there was no room for the axes
        score(workplace, tmp_path, label_counts="20", seeds=1)


def test_a_run_that_was_stopped_resumes(workplace, tmp_path, monkeypatch):
    """Regression: an error in the last of twelve trainings lost them all."""
    models = "discriminant,harmonic_discriminant,neighbours"
    keywords = {"models": models, "label_counts": "20,60"}
    whole = score(workplace, tmp_path / "whole", **keywords)
    fit, fitted = tasks.Classes.fit, []

    def fit_some(name, x, *rest):
        assert len(rest[2]) == len(x), "the block of each label, so that folds are of blocks"
        fitted.append(name)
        return fit(name, x, *rest) if len(fitted) != 5 else 1 / 0

    monkeypatch.setattr(tasks.Classes, "fit", staticmethod(fit_some))
    with pytest.raises(ZeroDivisionError):
        score(workplace, tmp_path / "parts", **keywords)
    result = score(workplace, tmp_path / "parts", **keywords)
    assert len(fitted) == 13, "four of twelve were done before the fifth failed"
    assert result["scores"] == whole["scores"]
    assert result["tests"] == whole["tests"]
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    with pytest.raises(ZeroDivisionError):
        fitted.clear()
        score(workplace, tmp_path / "parts", **keywords)
    other = {"checkpoint_path": workplace / "pretrained/last.pt", **keywords, "draws": 2}
    score(workplace, tmp_path / "parts", **other)
    assert len(fitted) == 17, "scores of another kind of representation are of no use"


def test_a_network_that_cannot_be_trained_ends_in_one_line(workplace, tmp_path, monkeypatch):
    script = tmp_path / "train_classification.py"
    script.write_text("raise SystemExit('error: no space left')")
    monkeypatch.setattr("running.script.ROOT", tmp_path)
    with pytest.raises(InputError, match="train_classification.py ended: error: no space"):
        score(workplace, tmp_path / "out", models="scratch", seeds=1, label_counts="20")
    assert not (tmp_path / "out/.network").exists()


@pytest.mark.slow
def test_settings_are_chosen_without_the_test_pixels(workplace, tmp_path):
    """With other test pixels the same settings are chosen; and the scores are other ones."""
    checkpoint = load_checkpoint(workplace / "pretrained/best.pt")
    base_path = tmp_path / "changed"
    for number in range(2):
        tile = tile_of(workplace, number)
        folder = tile_of(base_path, number)
        folder.mkdir(parents=True)
        for file in tile.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    config = {**label_efficiency.run_config, "base_path": base_path, "dataset_name": "toy"}
    dataset = label_efficiency.open_split("test", checkpoint, config)
    for number, tile in enumerate(dataset.tiles):
        is_test, bands = dataset.pixel_mask(number), np.array(tile.bands)
        bands[:, is_test] = bands[:, is_test][..., ::-1]
        save(tile.path, "bands", bands)
        labels = np.array(tile.labels)
        labels[is_test] = 135 - labels[is_test]  # 40 and 95, the other way round
        save(tile.path, "labels", labels)
    models = "embedding,neighbours,forest,harmonic"
    one, other = (
        score(path, tmp_path / name, models=models, seeds=1, label_counts="40", **more)["scores"]
        for path, name, more in (
            (workplace, "one", {}),
            (base_path, "other", {"checkpoint_path": workplace / "pretrained/best.pt"}),
        )
    )
    assert [row["chosen"] for row in one] == [row["chosen"] for row in other]
    assert None not in [row["chosen"] for row in one]
    assert [row["macro_f1"] for row in one] != [row["macro_f1"] for row in other]


@pytest.mark.slow
def test_draws_of_labels_take_turns_with_the_checkpoints(workplace, tmp_path):
    first = workplace / "pretrained/best.pt"
    content = load_checkpoint(first)
    other = {name: torch.randn_like(value) for name, value in content["backbone_state"].items()}
    torch.save(content | {"backbone_state": other}, tmp_path / "other.pt")
    both, one, two = (
        score(
            workplace,
            tmp_path / name,
            checkpoint_path=paths,
            models="embedding",
            label_counts="40",
            seeds=3,
        )
        for name, paths in (
            ("both", f"{first},{tmp_path / 'other.pt'}"),
            ("one", first),
            ("two", tmp_path / "other.pt"),
        )
    )
    assert [row["checkpoint"] for row in both["scores"]] == [0, 1, 0]
    f1 = [[row["macro_f1"] for row in result["scores"]] for result in (both, one, two)]
    assert f1[0] == [f1[1][0], f1[2][1], f1[1][2]]
    assert f1[1] != f1[2]
    assert len(both["retrieval"]["embedding"]) == len(both["rankme"]["untrained"]) == 2


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"models": "embedding,trees"}, "models=embedding,trees: found 'trees', wanted all, fast"),
        ({"retrieval_pixels": 1}, "retrieval_pixels=1: wanted 2 to"),
        ({"label_counts": "1"}, "label_counts=1: wanted 0"),
    ],
)
def test_mistakes_end_in_one_line(workplace, tmp_path, keywords, message):
    with pytest.raises(InputError, match=message):
        score(workplace, tmp_path / "out", **keywords)
    assert not (tmp_path / "out").exists()


def test_two_in_one_folder_are_refused(workplace, tmp_path):
    """Regression: one run removed the network that the other was training."""
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"), pytest.raises(InputError, match="found another run"):
        score(workplace, tmp_path / "out", label_counts="20")


def test_an_encoder_that_has_learned_from_labels_is_refused(workplace, tmp_path):
    """Regression: with a classifier's encoder, "50 labels" scored what 1663 had taught."""
    with pytest.raises(InputError, match="best.pt: .*classifier.* wanted .*pretrained"):
        score(workplace, tmp_path / "out", checkpoint_path=workplace / "classifier/best.pt")


def test_checkpoints_of_other_data_are_refused(workplace, tmp_path):
    save_small_checkpoint(tmp_path / "other.pt", config={"block_size": 7})
    paths = f"{workplace / 'pretrained/best.pt'},{tmp_path / 'other.pt'}"
    with pytest.raises(InputError, match="other.pt: found another block_size, mean, std than in"):
        score(workplace, tmp_path / "out", checkpoint_path=paths)


def test_two_names_of_one_code_are_refused(workplace, tmp_path):
    """Regression: tiles whose codes mean different crops were mixed silently."""
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8)
    for number, name in enumerate(("Maize", "Wheat")):
        path = tile_of(base_path, number) / "tile.json"
        classes = {"classes": {"40": {"name": name}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | classes))
    with pytest.raises(InputError, match="found name 'Wheat' for class 40, wanted 'Maize' as in"):
        score(workplace, tmp_path / "out", base_path=base_path)


def test_classes_that_the_cap_has_lost_are_named(workplace, tmp_path, capsys):
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    tile = Tile(tile_of(base_path))
    labels, split = np.array(tile.labels), tile.split_map(4)
    for code in (1, 3):
        labels.flat[np.flatnonzero(split == code)[5]] = 10
    save(tile.path, "labels", labels)
    notice.cache_clear()
    keywords = {"label_counts": "0", "most_pixels": 20, "models": "harmonic", "seeds": 1}
    score(workplace, tmp_path / "out", base_path=base_path, **keywords)
    out = capsys.readouterr().out
    for split in ("train", "test"):
        cut = rf"{split}: \d+ labelled pixels, cut to most_pixels=20 of them, chosen at random"
        assert re.search(rf"{cut}; found no pixel of classes \[10\] among these", out)


def test_test_pixels_that_the_encoder_may_have_seen_are_declared(workplace, tmp_path, capsys):
    """Regression: splits.npy came after pretraining, which had trained on what is tested."""
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    keywords = {"base_path": base_path, "label_counts": "20", "models": "harmonic", "seeds": 1}
    notice.cache_clear()
    score(workplace, tmp_path / "same", **keywords)
    assert "another split" not in capsys.readouterr().out
    split = Tile(tile_of(base_path)).split_map(4)
    save(tile_of(base_path), "splits", np.roll(split, 8, 0))
    score(workplace, tmp_path / "other", **keywords)
    assert "best.pt: found that it was trained with another split of 1" in capsys.readouterr().out
