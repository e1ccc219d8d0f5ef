"""Scores of a classification."""

import numpy as np
import pytest

from evaluation import scores
from evaluation.scores import macro_f1, plot_confusion, print_scores, score_classes
from maps.land_cover import class_legend


def test_scores_agree_with_counting():
    labels, predicted = np.array([1, 1, 1, 2, 2, 5]), np.array([1, 1, 2, 2, 2, 1])
    scores = score_classes(labels, predicted, class_legend([1, 2, 5], {}))
    assert scores["overall_accuracy"] == pytest.approx(4 / 6)
    assert scores["confusion_matrix"] == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert scores["per_class"]["1"]["precision"] == pytest.approx(2 / 3)
    assert scores["per_class"]["5"] == {
        "name": "class 5",
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "support": 1,
    }
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 0.8 + 0) / 3)


def test_a_class_without_a_label_is_no_class_to_average_over():
    """Regression: one pixel predicted as a class without labels cost a sixth of the score."""
    labels, predicted = np.array([1, 1, 1, 2, 2, 2]), np.array([1, 1, 5, 2, 2, 2])
    scores = score_classes(labels, predicted, class_legend([1, 2, 5], {}))
    assert scores["macro_f1"] == macro_f1(labels, predicted) == pytest.approx((0.8 + 1) / 2)
    counted = score_classes([1, 2, 1], [1, 2, 5], class_legend([1, 2, 5], {}), [2, 3, 1])
    assert counted == scores


@pytest.mark.parametrize(("count", "is_numbered"), [(40, True), (41, False), (254, False)])
def test_the_picture_of_many_classes_is_small(monkeypatch, count, is_numbered):
    """Regression: with 120 classes it took 54 seconds and 2.5 GB, at the end of a training."""
    figures = []
    monkeypatch.setattr(scores, "save_figure", lambda figure, path: figures.append(figure))
    plot_confusion(np.eye(count, dtype=int), class_legend(range(1, count + 1), {}), "", "")
    assert len(figures[0].axes[0].texts) == (count**2 if is_numbered else 0)
    assert max(figures[0].get_size_inches()) <= 24


def test_a_class_without_labels_has_no_scores_and_one_that_is_never_mapped_is_named(capsys):
    names = {"1": {"name": "Wheat"}, "2": {"name": "Maize"}, "5": {"name": "Clover"}}
    scores = score_classes([1, 1, 2], [1, 5, 1], class_legend([1, 2, 5], names))
    print_scores(scores)
    out = capsys.readouterr().out
    (clover,) = [line for line in out.splitlines() if line.startswith("   5 Clover")]
    assert clover.count("–") == 3
    assert clover.endswith("support 0")
    (maize,) = [line for line in out.splitlines() if line.startswith("   2 Maize")]
    assert "recall 0.000" in maize
    assert "never mapped, though it has labels here: 2 Maize\n" in out
    print_scores(score_classes([1, 2], [1, 2], class_legend([1, 2, 5], names)))
    assert "never mapped" not in capsys.readouterr().out
