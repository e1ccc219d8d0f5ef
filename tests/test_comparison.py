"""Cross-validated classifiers, and tests of a difference between two models."""

import warnings
from functools import partial

import numpy as np
import pytest
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from evaluation import classifiers as module
from evaluation import differences
from evaluation.classifiers import classifiers, find_label_folds, fit_classifier
from evaluation.differences import block_bootstrap, paired_p
from evaluation.rows import MODELS, OWN, QUANTITY_MODELS
from evaluation.scores import macro_f1, measurable_classes, resample_f1

NAMES = list(classifiers(0))


def noisy_classes(count, noise, seed=0, features=20):
    """Features (N, F) of three classes, which differ in the first feature alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count) * 10
    x = rng.normal(0, 1, (count, features))
    x[:, 0] = labels / 10 + rng.normal(0, noise, count)
    return x.astype(np.float32), labels


def test_the_setting_follows_the_data():
    """Many neighbours where the classes overlap, few where they are thin stripes."""
    x, labels = noisy_classes(400, noise=1, features=1)
    assert fit_classifier("k nearest neighbours", x, labels)[1] >= 9
    stripes = np.floor(np.linspace(0, 100, 400)).astype(int) % 2
    place = np.linspace(0, 1, 400)[:, None]
    assert fit_classifier("k nearest neighbours", place, stripes)[1] <= 3


def test_the_setting_is_the_best_over_the_folds(monkeypatch):
    monkeypatch.setattr(module, "REPEATS", 1)
    x, labels = noisy_classes(40, noise=0.5, features=5)
    model, setting, values = classifiers(0)["logistic regression"]
    scores = [
        cross_val_score(
            model.set_params(**{setting: value}),
            x,
            labels,
            scoring="f1_macro",
            cv=find_label_folds(labels)[0],
        ).mean()
        for value in values
    ]
    assert max(scores) > min(scores)
    assert fit_classifier("logistic regression", x, labels)[1] == values[np.argmax(scores)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("labels", "is_chosen"),
    [
        ([1, 1, 1, 1], False),  # one class
        ([1, 2], False),  # one label of each
        ([1, 1, 1, 2], False),  # one class has two labels or more
        ([1, 1, 2, 2, 3], True),  # folds without class 3
        ([1] * 30 + [2] * 3 + [3], True),
    ],
)
def test_rare_classes_neither_warn_nor_are_lost(name, labels, is_chosen, monkeypatch):
    monkeypatch.setattr(module, "SEARCH_TREES", 10)
    labels = np.array(labels)
    x = labels[:, None] + np.random.default_rng(0).normal(0, 0.01, (len(labels), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, value = fit_classifier(name, x, labels)
    assert (value is not None) == (is_chosen and bool(classifiers(0)[name][1]))
    assert set(model.classes_) == set(labels)


def test_folds_hold_every_class_in_every_part(monkeypatch):
    labels = np.repeat([1, 2, 3], [40, 3, 1])
    folds, unit = find_label_folds(labels)
    assert unit == "pixels"
    assert len(folds) == 3 * 4, "the smaller class has three; few labels are divided four times"
    for train, test in folds:
        assert not set(train) & set(test)
        assert set(labels[train]) == set(labels[test]) == {1, 2}
    assert len(find_label_folds(np.repeat([1, 2], 200))[0]) == 5
    monkeypatch.setattr(module, "SEARCH_LABELS", 30)
    train, test = find_label_folds(np.repeat([1, 2], 400))[0][0]
    assert len(train) + len(test) == 30
    labels = np.repeat([1, 2, 3], [4000, 4000, 8])
    for train, test in find_label_folds(labels)[0]:
        assert len(train) + len(test) == 30
        assert set(labels[train]) == set(labels[test]) == {1, 2, 3}, "a rare class is not lost"


def fields(blocks=30, size=8, classes=(1, 2)):
    """Labels (N,) of fields of one class each, and the field (N,) of each label."""
    groups = np.repeat(np.arange(blocks), size)
    return np.resize(classes, blocks)[groups], groups


def test_folds_keep_blocks_whole():
    """Else what is known of a pixel's own field chooses the setting for other fields."""
    labels, groups = fields()
    labels[groups == 3] = 7  # a class in a single block, a thirtieth of the labels
    folds, unit = find_label_folds(labels, groups=groups)
    assert (unit, len(folds)) == ("blocks", 5)
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
        assert set(labels[train]) == set(labels[test]) == {1, 2}
    assert len(find_label_folds(labels[:60], groups=groups[:60])[0]) > 5, "divided several times"
    labels[groups < 4] = groups[groups < 4] + 7  # more than a tenth of the labels
    folds, unit = find_label_folds(labels, groups=groups)
    assert unit == "pixels"
    assert set(labels[folds[0][0]]) == set(labels)
    assert find_label_folds(labels[:1], groups=groups[:1]) == ([], "")


def test_blocks_choose_another_setting_than_pixels():
    """Pixels of one field are alike: the nearest is of the same field, and of other fields not."""
    labels, groups = fields()
    rng = np.random.default_rng(0)
    x = labels + rng.normal(0, 0.5, 30)[groups] + rng.normal(0, 1e-3, len(labels))
    by_pixels, by_blocks = (
        fit_classifier("k nearest neighbours", x[:, None], labels, 0, units)[1]
        for units in (None, groups)
    )
    assert by_pixels <= 5 < by_blocks


def test_macro_f1_leaves_out_classes_of_few_pixels():
    labels = np.repeat([1, 2, 3], [40, 20, 19])
    predicted = np.where(labels == 3, 1, labels)
    assert measurable_classes(labels).tolist() == [1, 2]
    found = macro_f1(labels, predicted, codes=measurable_classes(labels))
    assert found == pytest.approx((2 * 40 / (2 * 40 + 19) + 1) / 2), "its pixels count for others"
    assert found > 1.4 * macro_f1(labels, predicted)
    assert measurable_classes(labels[30:]).tolist() == [1, 2, 3], (
        "all, where fewer than two have 20"
    )


def test_the_interval_is_of_the_scored_classes():
    """One pixel of a rare class moves macro-F1 over all classes, and not over the others."""
    labels, ours, theirs = predictions()
    labels[:3] = 9
    ours, theirs = np.vstack([ours] * 2), np.vstack([ours] * 2)
    ours[:, :3], theirs[:, :3] = 9, 1
    groups = np.arange(1200) // 10
    some = block_bootstrap(partial(resample_f1, codes=[2, 3, 4]), labels, groups, ours, theirs)
    assert some == (0, 0)
    assert block_bootstrap(resample_f1, labels, groups, ours, theirs)[1] > 0.1


def test_a_difference_in_every_draw_has_a_smaller_p_than_one_by_chance():
    theirs = np.array([0.5, 0.6, 0.55, 0.62, 0.51])
    assert paired_p(theirs + [0.05, 0.06, 0.05, 0.04, 0.05], theirs) < 0.001
    assert paired_p(theirs + [0.05, -0.06, 0.05, -0.04, 0.01], theirs) > 0.5
    assert paired_p([0.7], [0.6]) is None
    assert paired_p([0.7, 0.8], [0.7, 0.8]) is None


def predictions(pixels=1200, classes=4, right=(0.8, 0.7), seed=0):
    """Labels, and two rows of predictions of each of two models; right: share of right ones."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, classes + 1, pixels)
    models = []
    for share in right:
        hit = rng.random((2, pixels)) < share
        models.append(np.where(hit, labels, rng.integers(1, classes + 1, (2, pixels))))
    return labels, *models


@pytest.mark.slow
def test_the_interval_agrees_with_resampled_pixels():
    labels, ours, theirs = predictions()
    groups = np.arange(1200) // 10
    rng, differences = np.random.default_rng(5), []
    for _ in range(300):
        rows = np.concatenate([np.arange(10) + 10 * block for block in rng.integers(0, 120, 120)])
        f1 = [
            [f1_score(labels[rows], draw[rows], average="macro") for draw in model]
            for model in (ours, theirs)
        ]
        differences.append(np.mean(f1[0]) - np.mean(f1[1]))
    wanted = np.percentile(differences, [2.5, 97.5])
    np.testing.assert_allclose(
        block_bootstrap(resample_f1, labels, groups, ours, theirs), wanted, atol=0.01
    )


def test_blocks_that_are_alike_inside_make_a_wider_interval():
    """The same pixels thirty times say no more; taken for independent they would."""
    labels, ours, theirs = (np.repeat(values, 30, axis=-1) for values in predictions(100))
    blocks = block_bootstrap(resample_f1, labels, np.arange(3000) // 30, ours, theirs)
    pixels = block_bootstrap(resample_f1, labels, np.arange(3000), ours, theirs)
    assert blocks[1] - blocks[0] > 3 * (pixels[1] - pixels[0])


def test_equal_models_differ_by_nothing_and_one_block_has_no_interval():
    labels, ours, _ = predictions()
    assert block_bootstrap(resample_f1, labels, np.arange(1200) // 10, ours, ours) == (0, 0)
    assert block_bootstrap(resample_f1, labels, np.zeros(1200, int), ours, ours) is None


def test_both_models_are_scored_on_the_classes_that_a_resample_has(monkeypatch):
    """Regression: a model that predicted a class without labels got a zero that others did not."""
    monkeypatch.setattr(differences, "BOOTSTRAPS", 200)
    labels, groups = np.repeat([1, 2], 60), np.tile(np.arange(6), 20)
    labels[groups == 0] = np.resize([1, 2, 5], 20)
    theirs = np.where(np.arange(120) % 10 == 0, 3 - labels.clip(1, 2), labels)[None]
    ours = theirs.copy()
    ours[0, np.arange(6) + 60] = 5  # a pixel of each block
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        times = np.bincount(rng.integers(6, size=6), minlength=6)
        rows = np.repeat(np.arange(120), times[groups])
        f1 = [macro_f1(labels[rows], model[0, rows]) for model in (ours, theirs)]
        found.append(f1[0] - f1[1])
    wanted = np.percentile(found, [2.5, 97.5])
    np.testing.assert_allclose(
        block_bootstrap(resample_f1, labels, groups, ours, theirs), wanted, atol=1e-6
    )


def test_the_support_vector_machine_is_that_of_scikit_learn():
    """Features of unlike scales, standardised; C 3."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    x = (rng.normal(size=(120, 4)) * 2 + labels[:, None]) * [1, 1e-3, 1e3, 1]
    model, chosen = fit_classifier("support vector machine", x, labels)
    mean, std = x.mean(0), x.std(0)
    new = rng.normal(size=(500, 4)) * std * 2 + mean
    wanted, other = (
        SVC(C=c).fit((x - mean) / std, labels).predict((new - mean) / std) for c in (3, 1)
    )
    assert (model.predict(new) == wanted).all()
    assert (other != wanted).any()
    assert chosen is None


def test_rows_of_the_embedding_are_no_baselines():
    for models in (MODELS, QUANTITY_MODELS):
        own = {name for name, one in models.items() if one.features.startswith("embedding")}
        assert own | {"finetuned"} == {name for name in models if name in OWN}
