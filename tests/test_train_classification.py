"""Fine-tuning: what it starts from, what it learns, reports and refuses."""

import json
import re
import subprocess
from types import SimpleNamespace

from running.checkpoints import load_checkpoint
from running.errors import InputError, notice

import numpy as np
import pytest
import torch
from helpers import (
    GEOREFERENCE,
    assert_same_weights,
    fine_tune,
    lines,
    make_dataset,
    run,
    save,
    tile_of,
)

import infer
import train_classification
from backbones import BACKBONES, HEADS, Classifier, load_backbone
from evaluation import networks
from tiles import TEST, TRAIN, VALIDATION, Tile
from training import finetuning as loop
from training import mapping


def test_fine_tuning_starts_from_the_pretrained_weights(workplace, tmp_path, monkeypatch):
    """Guards against pretrained weights that are silently not loaded (strict=False)."""
    content = load_checkpoint(workplace / "pretrained/best.pt")
    started = {}
    fit = loop.fit

    def spy(run, *rest):
        started.update({k: v.clone() for k, v in run.model.backbone.state_dict().items()})
        return fit(run, *rest)

    monkeypatch.setattr(loop, "fit", spy)
    fine_tune(workplace, tmp_path / "start", epochs=1, label_count=40)
    assert_same_weights(started, dict(load_backbone(content).state_dict()))
    tuned = load_checkpoint(tmp_path / "start/best.pt")
    assert not all(tuned["backbone_state"][key].equal(value) for key, value in started.items())
    architecture = ("backbone", "latent_dim", "width", "depth", "day_cycles")
    assert all(tuned["config"][key] == content["config"][key] for key in architecture)


def test_a_frozen_backbone_stays_as_it_is(workplace, tmp_path):
    """A frozen backbone in train mode would drop units and move its BatchNorm statistics."""
    fine_tune(workplace, tmp_path / "frozen", freeze_backbone=True, epochs=2, label_count=40)
    backbone = load_backbone(load_checkpoint(workplace / "pretrained/best.pt"))
    after = load_checkpoint(tmp_path / "frozen/best.pt")["backbone_state"]
    assert_same_weights(after, dict(backbone.state_dict()))
    classifier = Classifier(
        backbone, head="linear", num_classes=2, dropout=0.1, freeze_backbone=True
    )
    classifier.train()
    assert classifier.head.training
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_learns_and_reports(workplace, tmp_path, head, loss, capsys):
    keywords = {"head": head, "loss": loss, "class_weights": loss == "focal", "epochs": 4}
    scores = fine_tune(workplace, tmp_path / "out", learning_rate=3e-3, **keywords)
    assert scores["overall_accuracy"] > 0.7, "two classes, half of the pixels each"
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert saved == json.loads(json.dumps(scores))
    assert saved["split"] == "test"
    assert list(saved["classes"]) == ["40", "95"], "95 is a class of its own"
    assert saved["classes"]["95"]["name"] == "Mangroves"
    matrix = np.array(saved["confusion_matrix"])
    assert matrix.trace() / matrix.sum() == pytest.approx(saved["overall_accuracy"])
    assert [row["support"] for row in saved["per_class"].values()] == matrix.sum(1).tolist()
    for name in ("confusion_matrix", "confusion_matrix_validation"):
        assert (tmp_path / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out.splitlines()
    title = said.index(f"test split of toy, {matrix.sum()} pixels:")
    assert said[title + 1].startswith("overall accuracy"), "whose scores these are"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_scratch_with_every_backbone(workplace, tmp_path, backbone):
    keywords = {"backbone": backbone, "width": 16, "depth": 1, "latent_dim": 8, "block_size": 4}
    scores = fine_tune(
        workplace, tmp_path / "out", checkpoint_path="", epochs=1, min_valid=5, **keywords
    )
    assert 0 <= scores["macro_f1"] <= 1
    (folder,) = run(
        infer,
        checkpoint_path=tmp_path / "out/best.pt",
        tile_path=tile_of(workplace),
        output_dir=tmp_path / "maps",
    )
    assert set(np.unique(np.load(folder / "classification_map.npy"))) <= {0, 40, 95}


def test_the_test_split_is_scored_once_and_chooses_nothing(workplace, tmp_path, monkeypatch):
    """The final score must not come from a split that helped to choose the model."""
    seen = []
    predict = train_classification.predict

    def spy(classifier, dataset, *rest):
        seen.append(dataset.split)
        return predict(classifier, dataset, *rest)

    monkeypatch.setattr(train_classification, "predict", spy)
    fine_tune(workplace, tmp_path / "once", epochs=3)
    assert seen == ["validation"] * 5 + ["test"], "the start is validated; best.pt is calibrated"
    seen.clear()
    fine_tune(workplace, tmp_path / "few", epochs=3, label_count=40)
    assert seen == ["test"]


def test_an_early_epoch_is_not_the_best(workplace, tmp_path, monkeypatch):
    """Regression: at the full rate scores jump; the highest were early, and worse on the test."""
    scored = iter([0.5, 0.9, 0.8, 0.7, 0.4, 0.6, 0.5, 0.0])  # of the start, six epochs, the test
    score = train_classification.score_classes
    monkeypatch.setattr(
        train_classification,
        "score_classes",
        lambda *arguments: score(*arguments) | {"macro_f1": next(scored)},
    )
    scores = fine_tune(workplace, tmp_path / "out", epochs=6)
    assert (scores["best_epoch"], scores["validation_macro_f1"]) == (5, 0.6)


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_with_label_count_no_other_labels_are_used(workplace, tmp_path, freeze_backbone):
    """Regression: a thousand validation labels chose the epoch of a model with label_count=40."""
    scores = []
    for name in ("as they are", "swapped"):
        base_path = make_dataset(tmp_path / name, shape=(20, 24, 16, 10), clear=0.8)
        for tile in (tile_of(base_path, number) for number in range(2)):
            labels, split = np.load(tile / "labels.npy"), Tile(tile).split_map(4)
            here = (split == VALIDATION) & (name == "swapped")
            save(tile, "labels", np.where(here, 135 - labels, labels).astype(np.uint8))
            save(tile, "splits", split)
        keywords = {"label_count": 40, "epochs": 0 if freeze_backbone else 4}
        keywords |= {"freeze_backbone": freeze_backbone, "base_path": base_path}
        scores.append(fine_tune(workplace, tmp_path / name / "out", **keywords))
    assert scores[0] == scores[1]
    assert "validation_macro_f1" not in scores[0]


def test_an_encoder_of_a_classifier_is_declared(workplace, tmp_path, capsys):
    """Regression: 50 labels, and an encoder that had learned from all, scored .79 for .75."""
    keywords = {"checkpoint_path": workplace / "classifier/best.pt", "epochs": 1}
    fine_tune(workplace, tmp_path / "all", **keywords)
    assert "found a classifier" not in capsys.readouterr().out
    fine_tune(workplace, tmp_path / "few", **keywords, label_count=40)
    assert "classifier/best.pt: found a classifier, whose encoder" in capsys.readouterr().out


def test_a_frozen_encoder_and_a_linear_head_are_not_trained(workplace, tmp_path):
    """Regression: trained on by steps, the head only got worse."""
    scores = fine_tune(workplace, tmp_path / "out", freeze_backbone=True)
    assert scores["best_epoch"] == 0
    assert [line["step"] for line in lines(tmp_path / "out")] == [0, 1], "the start, the test"
    assert fine_tune(workplace, tmp_path / "out", freeze_backbone=True) == scores


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"checkpoint_path": ""}, "freeze_backbone=true: wanted a checkpoint_path"),
        ({"head": "tree"}, "head=tree: wanted one of linear, mlp, attention"),
        ({"label_count": 99999}, "labelled pixels .*wanted label_count=99999"),
        ({"dataset_name": "other"}, "MGRS-0: found no band X6 among X0,.*,X5, wanted X0,"),
        ({"dataset_name": "bare"}, "found no labels.npy"),
        ({"output_dir": "/proc/no"}, "output_dir=/proc/no: not writable"),
        (
            {"checkpoint_path": "", "freeze_backbone": False, "backbone": "cnn", "sample_size": 0},
            "sample_size=0: wanted 1 to 1000",
        ),
    ],
)
def test_mistakes_of_fine_tuning(workplace, tmp_path, keywords, message):
    make_dataset(tmp_path, name="toy")
    make_dataset(tmp_path, name="bare", labels=False)
    make_dataset(tmp_path, name="other", shape=(20, 16, 16, 6))
    standard = {"base_path": tmp_path, "freeze_backbone": True, "output_dir": tmp_path / "out"}
    with pytest.raises(InputError, match=message) as error:
        fine_tune(workplace, **standard | keywords)
    assert "\n" not in str(error.value)


def test_a_finished_run_is_not_overwritten(workplace):
    message = "wanted the same, or another output_dir or overwrite=true"
    with pytest.raises(InputError, match=message):
        fine_tune(workplace, workplace / "classifier", epochs=1)


def test_the_result_of_few_labels_is_a_mean_of_start_and_end(workplace, tmp_path, monkeypatch):
    """Regression: fine-tuning 100 labels to the end was worse than not to train at all."""
    keywords, parts = {"label_count": 40, "epochs": 2}, {}
    average, at_the_end = loop.average_with_start, {}

    def spy(run, start, train):
        at_the_end.update({key: v.clone() for key, v in run.model.state_dict().items()})
        average(run, start, train)

    monkeypatch.setattr(loop, "average_with_start", spy)
    for name, more in (("start", {"learning_rate": 1e-12, "weight_decay": 0}), ("mean", {})):
        fine_tune(workplace, tmp_path / name, **keywords | more)
        content = load_checkpoint(tmp_path / name / "best.pt", ("classifier",))
        both = {"backbone": content["backbone_state"], "head": content["head_state"]}
        parts[name] = {f"{k}.{key}": v for k, state in both.items() for key, v in state.items()}
    assert any(not parts["start"][key].equal(value) for key, value in at_the_end.items())
    for key, value in parts["mean"].items():
        expected = (parts["start"][key] + at_the_end[key]) / 2
        torch.testing.assert_close(value, expected.to(value.dtype), atol=1e-6, rtol=1e-5)


# ---- what must not be silent ---------------------------------------------------------------------


def two_legends(base_path):
    """The tiles of `make_dataset`, with two meanings of code 40."""
    for number, name in enumerate(("Maize", "Wheat")):
        path = tile_of(base_path, number) / "tile.json"
        classes = {"40": {"name": name}, "95": {"name": "Mangroves"}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": classes}))
    return base_path


def test_two_names_of_one_code_are_refused(workplace, tmp_path):
    base_path = two_legends(make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8))
    message = r"MGRS-1/tile.json: found name 'Wheat' for class 40, wanted 'Maize' as in .*MGRS-0"
    with pytest.raises(InputError, match=message):
        fine_tune(workplace, tmp_path / "out", base_path=base_path)


def test_a_rare_class_is_not_lost_by_the_cap_of_the_start(workplace, tmp_path, monkeypatch):
    """Regression: a class outside the first 10,000 labels was never predicted, silently."""
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    tile = tile_of(base_path)
    train_pixels = np.argwhere(Tile(tile).split_map(4) == TRAIN)
    rare = tuple(train_pixels[40:46].T)
    labels, bands = np.load(tile / "labels.npy"), np.load(tile / "bands.npy")
    labels[rare] = 10
    bands[(slice(None), *rare)] = bands[(slice(None), *rare)][..., ::-1]  # like no other class
    save(tile, "labels", labels)
    save(tile, "bands", bands)
    seen, fit = [], train_classification.fit_linear_start

    def spy(y, labels, *rest):
        seen.append(labels)
        return fit(y, labels, *rest)

    monkeypatch.setattr(networks, "MAX_LABELS", 30)
    monkeypatch.setattr(train_classification, "fit_linear_start", spy)
    fine_tune(workplace, tmp_path / "out", base_path=base_path, freeze_backbone=True)
    assert len(seen[0]) == 30
    assert set(seen[0].tolist()) == {0, 1, 2}


def test_classes_without_a_training_label_are_named(workplace, tmp_path, capsys):
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    tile = Tile(tile_of(base_path))
    labels = np.array(tile.labels)
    labels.flat[np.flatnonzero(tile.split_map(4) == TEST)[0]] = 10
    save(tile.path, "labels", labels)
    notice.cache_clear()
    fine_tune(workplace, tmp_path / "out", base_path=base_path, freeze_backbone=True)
    assert "training labels: found none of class 10 Tree cover, so" in capsys.readouterr().out


def test_test_pixels_that_the_encoder_may_have_seen_are_declared(workplace, tmp_path, capsys):
    """Regression: splits.npy came after pretraining, which had trained on what is tested."""
    notice.cache_clear()
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    keywords = {"base_path": base_path, "freeze_backbone": True}
    fine_tune(workplace, tmp_path / "same", **keywords)
    assert "another split" not in capsys.readouterr().out
    split = Tile(tile_of(base_path)).split_map(4)
    save(tile_of(base_path), "splits", np.roll(split, 8, 0))
    fine_tune(workplace, tmp_path / "other", **keywords)
    said = "pretrained/best.pt: found that it was trained with another split of 1 of 2 tiles (first"
    assert said in capsys.readouterr().out

    # this classifier's encoder has trained with both splits
    keywords["checkpoint_path"] = tmp_path / "other/best.pt"
    fine_tune(workplace, tmp_path / "again", **keywords)
    assert "other/best.pt: found that it was trained with another split" in capsys.readouterr().out


def test_a_checkpoint_of_earlier_versions_has_no_splits(workplace, tmp_path, capsys):
    content = load_checkpoint(workplace / "pretrained/best.pt")
    for name, splits in (("old", None), ("damaged", ["MGRS-0"])):
        changed = {key: value for key, value in content.items() if key != "splits"}
        torch.save(changed | ({"splits": splits} if splits else {}), tmp_path / f"{name}.pt")
        keywords = {"checkpoint_path": tmp_path / f"{name}.pt", "freeze_backbone": True}
        fine_tune(workplace, tmp_path / name, **keywords)
    assert "another split" not in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_lost_best_is_replaced_by_the_end_of_the_run(
    workplace, tmp_path, capsys, overwrite, damage
):
    """Regression: every rerun ended with "best.pt: found no file", with overwrite=true, too."""
    keywords = {"epochs": 2, "overwrite": overwrite}
    fine_tune(workplace, tmp_path / "out", **keywords)
    best, last = tmp_path / "out/best.pt", load_checkpoint(tmp_path / "out/last.pt")
    best.unlink() if damage == "gone" else best.write_bytes(best.read_bytes()[:1000])
    notice.cache_clear()
    scores = fine_tune(workplace, tmp_path / "out", **keywords)
    assert "out/best.pt: found no whole checkpoint" in capsys.readouterr().out
    assert scores["best_epoch"] == 2
    for key, value in last["head_state"].items():
        assert load_checkpoint(best)["head_state"][key].equal(value)


def test_few_labels_need_no_best_to_resume(workplace, tmp_path, capsys):
    """With label_count, best.pt is made at the end, of last.pt and the start."""
    keywords = {"epochs": 2, "label_count": 40}
    scores = fine_tune(workplace, tmp_path / "out", **keywords)
    stamp = (tmp_path / "out/last.pt").stat().st_mtime_ns
    (tmp_path / "out/best.pt").unlink()
    assert fine_tune(workplace, tmp_path / "out", **keywords) == scores
    assert "no whole checkpoint" not in capsys.readouterr().out
    assert (tmp_path / "out/last.pt").stat().st_mtime_ns == stamp, "trained again"


def test_a_run_of_an_older_version_resumes_unless_it_trained_otherwise(workplace, tmp_path):
    """Its config has keys that are gone, and two groups of parameters with a "peak"."""
    keywords = {"epochs": 2, "learning_rate": 3e-3}
    scores, last = fine_tune(workplace, tmp_path / "out", **keywords), tmp_path / "out/last.pt"
    content = load_checkpoint(last)
    for group in content["optimiser_state"]["param_groups"]:
        group["peak"] = 3e-3
    old = {"backbone_learning_rate": 3e-3, "start_share": -1.0, "warmup_fraction": 0.05}
    torch.save(content | {"config": content["config"] | old}, last)
    stamp = last.stat().st_mtime_ns
    assert fine_tune(workplace, tmp_path / "out", **keywords) == scores
    assert last.stat().st_mtime_ns == stamp, "trained again"
    old["backbone_learning_rate"] = 1e-4
    torch.save(content | {"config": content["config"] | old}, last)
    with pytest.raises(InputError, match=r"another backbone_learning_rate=0.003 \(was 0.0001\);"):
        fine_tune(workplace, tmp_path / "out", **keywords)


def test_a_fine_tuning_is_not_resumed_on_corrected_bands(workplace, tmp_path):
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    fine_tune(workplace, tmp_path / "out", base_path=base_path, epochs=1)
    bands = np.load(tile_of(base_path) / "bands.npy", mmap_mode="r+")
    bands[bands > 1000] -= 1000
    bands.flush()
    with pytest.raises(InputError, match="found a run on other data .observations"):
        fine_tune(workplace, tmp_path / "out", base_path=base_path, epochs=1)


# ---- another year --------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_command_maps_another_year_and_scores_it_by_class_names(workplace, tmp_path, capfd):
    """Scripts of their own, as a user starts them; codes of the other year differ, names agree."""
    make_dataset(tmp_path, tiles=1, name="next")
    (tmp_path / "data/toy").symlink_to(workplace / "data/toy")
    tile = tile_of(tmp_path, 0, "next")
    labels = np.load(tile / "labels.npy")
    save(tile, "labels", np.where(labels == 40, 95, np.where(labels == 95, 40, labels)))
    info = json.loads((tile / "tile.json").read_text())
    names = load_checkpoint(workplace / "classifier/best.pt")["classes"]
    info["classes"] = {"95": names["40"], "40": names["95"]}
    (tile / "tile.json").write_text(json.dumps(info))
    keys = {"base_path": tmp_path, "epochs": 2, "map_dataset_name": "next"}
    fine_tune(workplace, tmp_path / "out", **keys)
    folder = tmp_path / "out/maps/MGRS-0"
    assert np.load(folder / "classification_map.npy").shape == labels.shape
    assert (folder / "inference_map.png").exists()
    printed = capfd.readouterr().out.split("agreement with")[1]
    right = float(re.search(r"overall accuracy (\S+)", printed)[1])
    assert right > 0.6, "by name; by code it would be below .4"


def test_the_other_year_is_looked_for_before_training(workplace, tmp_path):
    with pytest.raises(InputError, match="data/nowhere/processed: found no tile"):
        fine_tune(workplace, tmp_path / "out", map_dataset_name="nowhere")
    assert not (tmp_path / "out").exists()


def test_bad_tiles_of_the_other_year_are_skipped_where_bad_tiles_are(
    workplace, tmp_path, monkeypatch
):
    make_dataset(tmp_path, tiles=2, name="next")
    (tile_of(tmp_path, 0, "next") / "doys.npy").unlink()
    (tmp_path / "data/toy").symlink_to(workplace / "data/toy")
    started = []

    def spy(script, keys):
        started.append((script, keys))
        return subprocess.CompletedProcess(script, 0)

    monkeypatch.setattr(mapping, "start_script", spy)
    other = {"base_path": tmp_path, "map_dataset_name": "next", "epochs": 1, "label_count": 40}
    with pytest.raises(InputError, match="MGRS-0"):
        fine_tune(workplace, tmp_path / "out", **other)
    fine_tune(workplace, tmp_path / "out", skip_bad_tiles=True, **other)
    (_, infer_keys), (_, read_keys) = started
    assert infer_keys["skip_bad_tiles"] is True
    assert read_keys["map_path"] == tmp_path / "out/maps/MGRS-1/classification_map.npy"


@pytest.mark.parametrize("few", [{"label_count": 40}, {}])
def test_a_finished_run_that_is_started_again_keeps_its_maps(workplace, tmp_path, few):
    """`infer.py` refuses a checkpoint of another hash, though its weights are the same."""
    fine_tune(workplace, tmp_path, epochs=1, **few)
    before = (tmp_path / "best.pt").read_bytes()
    fine_tune(workplace, tmp_path, epochs=1, **few)
    assert (tmp_path / "best.pt").read_bytes() == before
    (tmp_path / "best.pt").unlink()  # a kill before it was written
    fine_tune(workplace, tmp_path, epochs=1, **few)
    assert load_checkpoint(tmp_path / "best.pt")


def test_maps_are_made_as_the_run_was_and_a_script_that_fails_is_named(tmp_path, monkeypatch):
    tile, started = SimpleNamespace(path=tmp_path / "next/MGRS-0"), []
    config = {"overwrite": True, "device": "cpu", "wandb_mode": "offline", "wandb_dir": "logs"}
    config |= {"skip_bad_tiles": False}
    with pytest.raises(InputError, match="infer.py ended with status 1, see above"):
        mapping.map_tiles([tile], config | {"wandb_mode": "sometimes"}, "class_map", tmp_path)

    def spy(script, keys):
        started.append((script, {key: str(value) for key, value in keys.items()}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(mapping, "start_script", spy)
    mapping.map_tiles([tile], config, "class_map", tmp_path)
    logged = {"wandb_mode": "offline", "wandb_dir": "logs"}
    keys = {"checkpoint_path": f"{tmp_path}/best.pt", "tile_path": f"{tmp_path}/next"}
    keys |= {"output_dir": f"{tmp_path}/maps", "overwrite": "True", "device": "cpu"}
    keys |= {"skip_bad_tiles": "False"}
    of_map = {"map_path": f"{tmp_path}/maps/MGRS-0/class_map.npy"}
    assert started == [("infer.py", keys | logged), ("read_inference_map.py", of_map | logged)]
