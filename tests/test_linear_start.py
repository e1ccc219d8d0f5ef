"""The linear model that fine-tuning starts from."""

import numpy as np
import pytest
import torch

from backbones import Classifier, TransformerEncoder
from evaluation.classifiers import fit_classifier
from evaluation.networks import fit_linear_start
from utils import keep_classes


def representations(num_classes, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, 200)
    centres = rng.normal(0, 1, (num_classes, 8))
    y = 5 + 3 * (centres[labels] + noise * rng.normal(0, 1, (200, 8)))
    return y.astype(np.float32), labels


def classifier_of(head, num_classes):
    backbone = TransformerEncoder(num_bands=3, sample_size=4, latent_dim=8, width=16, depth=1)
    return Classifier(backbone, head=head, num_classes=num_classes, dropout=0.1, freeze_norm=True)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_head_starts_with_the_probabilities_of_scikit_learn(num_classes):
    y, labels = representations(num_classes)
    y[:, 3] *= 1e-3  # a variance that BatchNorm's epsilon would change
    classifier = classifier_of("linear", num_classes)
    classifier.head.start_from(*fit_linear_start(y, labels, num_classes))
    classifier.train()
    classifier.head[1].eval()  # dropout; BatchNorm must keep to its statistics by itself
    probe, _ = fit_classifier("discriminant analysis", y, labels)
    expected = probe.predict_proba(y)
    found = classifier.head(torch.from_numpy(y)).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_attention_head_starts_as_the_linear_one_does():
    start = fit_linear_start(*representations(3), 3)
    x, doys = torch.randn(6, 4, 3), torch.arange(1, 5).expand(6, 4) * 50
    classifiers = [classifier_of(head, 3).eval() for head in ("linear", "attention")]
    classifiers[1].backbone.load_state_dict(classifiers[0].backbone.state_dict())
    for classifier in classifiers:
        classifier.head.start_from(*start)
    one, other = (classifier(x, doys)[1] for classifier in classifiers)
    torch.testing.assert_close(one, other)


def test_classes_without_a_label_are_not_predicted():
    y, labels = representations(3)
    for wanted in (range(2), range(1)):
        keep = np.isin(labels, wanted)
        mean, var, weight, bias = fit_linear_start(y[keep], labels[keep], 5)
        logits = (torch.from_numpy(y) - mean) / var.sqrt() @ weight.T + bias
        assert set(logits.argmax(1).tolist()) == set(wanted)


def test_a_class_without_a_label_is_not_predicted_however_far_a_pixel_lies():
    """Regression: the logits of the labelled classes shared a linear part, and could all fall."""
    y, labels = representations(3)
    mean, var, weight, bias = fit_linear_start(y, labels, 5)
    far = 300 * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert set((far @ weight.T + bias).argmax(1).tolist()) <= {0, 1, 2}


def test_a_few_labels_are_enough():
    y, labels = representations(4)
    first = [int(np.flatnonzero(labels == number)[0]) for number in range(4)]
    start = fit_linear_start(y[first], labels[first], 4)
    assert all(part.isfinite().all() for part in start)


def test_a_choice_of_labels_keeps_every_class():
    """Rare classes keep five labels or all that they have; where none is rare, nothing changes."""
    labels = np.repeat([3, 10, 40, 95], [5000, 4000, 20, 2]).astype(np.uint8)
    rows = np.random.default_rng(0).choice(9000, 100, replace=False)  # the two common classes
    kept = keep_classes(rows, labels, np.random.default_rng(1))
    assert len(np.unique(kept)) == 100
    assert np.isin(kept, rows).sum() == 93
    assert np.bincount(labels[kept])[[40, 95]].tolist() == [5, 2]
    assert np.array_equal(keep_classes(rows, labels[:9000], np.random.default_rng(1)), rows)
    few = keep_classes(rows[:4], labels, np.random.default_rng(1))
    assert set(labels[few].tolist()) == {3, 10, 40, 95}
