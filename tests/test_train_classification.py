"""Fine-tuning: what it starts from, what it learns, reports and refuses."""

import json

import numpy as np
import pytest
import torch
from helpers import fine_tune, lines, make_dataset, run, save, tile_of

import infer
import train_classification
from backbones import BACKBONES, HEADS, Classifier, load_backbone
from files import load_checkpoint
from runtime import InputError
from tiles import VALIDATION, Tile


def test_fine_tuning_starts_from_the_pretrained_weights(workplace, tmp_path, monkeypatch):
    """Guards against pretrained weights that are silently not loaded (strict=False)."""
    content = load_checkpoint(workplace / "pretrained/best.pt")
    started = {}
    fit = train_classification.fit

    def spy(run, *rest):
        started.update({k: v.clone() for k, v in run.model.backbone.state_dict().items()})
        return fit(run, *rest)

    monkeypatch.setattr(train_classification, "fit", spy)
    fine_tune(workplace, tmp_path / "start", epochs=1, label_count=40)
    assert started.keys() == content["backbone_state"].keys()
    assert all(started[key].equal(value) for key, value in content["backbone_state"].items())
    tuned = load_checkpoint(tmp_path / "start/best.pt")
    assert not all(tuned["backbone_state"][key].equal(value) for key, value in started.items())
    architecture = ("backbone", "latent_dim", "width", "depth", "day_cycles")
    assert all(tuned["config"][key] == content["config"][key] for key in architecture)


def test_a_frozen_backbone_stays_as_it_is(workplace, tmp_path):
    """A frozen backbone in train mode would drop units and move its BatchNorm statistics."""
    fine_tune(workplace, tmp_path / "frozen", freeze_backbone=True, epochs=2, label_count=40)
    before = load_checkpoint(workplace / "pretrained/best.pt")["backbone_state"]
    after = load_checkpoint(tmp_path / "frozen/best.pt")["backbone_state"]
    assert all(after[key].equal(value) for key, value in before.items())
    backbone = load_backbone(load_checkpoint(workplace / "pretrained/best.pt"))
    classifier = Classifier(
        backbone, head="linear", num_classes=2, dropout=0.1, freeze_backbone=True
    )
    classifier.train()
    assert classifier.head.training
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_learns_and_reports(workplace, tmp_path, head, loss):
    keywords = {"head": head, "loss": loss, "class_weights": loss == "focal", "epochs": 4}
    scores = fine_tune(workplace, tmp_path / "out", backbone_learning_rate=3e-3, **keywords)
    assert scores["overall_accuracy"] > 0.7, "two classes, half of the pixels each"
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert saved == json.loads(json.dumps(scores))
    assert saved["split"] == "test"
    assert list(saved["classes"]) == ["40", "95"], "95 is a class of its own"
    assert saved["classes"]["95"]["name"] == "Mangroves"
    matrix = np.array(saved["confusion_matrix"])
    assert matrix.trace() / matrix.sum() == pytest.approx(saved["overall_accuracy"])
    assert [row["support"] for row in saved["per_class"].values()] == matrix.sum(1).tolist()
    assert (tmp_path / "out/confusion_matrix.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_scratch_with_every_backbone(workplace, tmp_path, backbone):
    keywords = {"backbone": backbone, "width": 16, "depth": 1, "latent_dim": 8, "block_size": 4}
    scores = fine_tune(
        workplace, tmp_path / "out", checkpoint_path="", epochs=1, min_valid=5, **keywords
    )
    assert 0 <= scores["macro_f1"] <= 1
    folder = tmp_path / "maps"
    run(
        infer,
        checkpoint_path=tmp_path / "out/best.pt",
        tile_path=tile_of(workplace),
        output_dir=folder,
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
    assert seen == ["validation"] * 4 + ["test"], "the start is validated, too"
    seen.clear()
    fine_tune(workplace, tmp_path / "few", epochs=3, label_count=40)
    assert seen == ["test"]


def test_an_early_epoch_is_not_the_best(workplace, tmp_path, monkeypatch):
    """Regression: on real tiles the highest scores were early, and worse on the test."""
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
def test_who_has_few_labels_needs_no_others(workplace, tmp_path, freeze_backbone):
    """Regression: a thousand validation labels chose the epoch of a model that should use 40."""
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


def test_labels_that_a_classifier_has_seen_are_spoken_of(workplace, tmp_path, capsys):
    """Regression: 50 labels and a classifier's encoder scored .79 in place of .75."""
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
        ({"dataset_name": "other"}, r"MGRS-0: found \['X0'.*X5'\], wanted \['X0'"),
        ({"dataset_name": "bare"}, "found no labels.npy"),
        ({"output_dir": "/proc/no"}, "output_dir=/proc/no: not writable"),
        ({"start_share": 0.5}, "start_share=0.5: wanted -1, or 0 to 1 with label_count"),
        ({"start_share": -0.5, "label_count": 40}, "start_share=-0.5: wanted -1, or 0 to 1"),
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


def test_the_result_of_few_labels_is_a_mean_of_start_and_end(workplace, tmp_path):
    """Regression: 100 labels fine-tuned to the end were worse than no training at all."""
    keywords = {"label_count": 40, "epochs": 2}
    parts = {}
    for name, more in (
        ("start", {"backbone_learning_rate": 1e-12, "learning_rate": 1e-12, "weight_decay": 0}),
        ("mean", {}),
        ("end", {"start_share": 0.0}),
    ):
        fine_tune(workplace, tmp_path / name, **keywords | more)
        content = load_checkpoint(tmp_path / name / "best.pt", ("classifier",))
        parts[name] = content["backbone_state"] | content["head_state"]
    assert any(not parts["start"][key].equal(parts["end"][key]) for key in parts["end"])
    for key, value in parts["mean"].items():
        expected = (parts["start"][key] + parts["end"][key]) / 2
        torch.testing.assert_close(value, expected.to(value.dtype), atol=1e-6, rtol=1e-5)
