"""The logistic regression that fine-tuning starts from."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from backbones import Classifier, TransformerEncoder
from linear_start import choose_penalty, fit_linear_start


def representations(num_classes, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, 200)
    centres = rng.normal(0, 1, (num_classes, 8))
    y = 5 + 3 * (centres[labels] + noise * rng.normal(0, 1, (200, 8)))
    return y.astype(np.float32), labels, rng.integers(0, 20, 200)


def classifier_of(head, num_classes):
    backbone = TransformerEncoder(num_bands=3, sample_size=4, latent_dim=8, width=16, depth=1)
    return Classifier(backbone, head=head, num_classes=num_classes, dropout=0.1, freeze_norm=True)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_head_starts_with_the_probabilities_of_scikit_learn(num_classes):
    y, labels, groups = representations(num_classes)
    classifier = classifier_of("linear", num_classes)
    classifier.head.start_from(*fit_linear_start(y, labels, groups, num_classes))
    classifier.train()
    classifier.head[1].eval()  # dropout; BatchNorm must keep to its statistics by itself
    penalty = choose_penalty(StandardScaler().fit_transform(y), labels, groups)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))
    expected = probe.fit(y, labels).predict_proba(y)
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
    y, labels, groups = representations(3)
    for wanted in (range(2), range(1)):
        keep = np.isin(labels, wanted)
        mean, var, weight, bias = fit_linear_start(y[keep], labels[keep], groups[keep], 5)
        logits = (torch.from_numpy(y) - mean) / var.sqrt() @ weight.T + bias
        assert set(logits.argmax(1).tolist()) == set(wanted)


def test_a_few_labels_are_enough():
    y, labels, groups = representations(4)
    first = [int(np.flatnonzero(labels == number)[0]) for number in range(4)]
    start = fit_linear_start(y[first], labels[first], groups[first], 4)
    assert all(part.isfinite().all() for part in start)


def test_noise_is_held_down_more_than_a_clear_difference():
    penalties = []
    for noise in (0.3, 30.0):
        y, labels, groups = representations(3, noise)
        z = (y - y.mean(0)) / y.std(0)
        penalties.append(choose_penalty(z, labels, groups))
    assert penalties[0] > penalties[1]
