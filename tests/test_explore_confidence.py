"""The confidence of the map that the page makes: its temperature, in a browser."""

import numpy as np
import pytest
from browser import draw_clicks, truth
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from evaluation.calibration import fit_temperature

pytest_plugins = ["browser"]  # its fixtures
pytestmark = pytest.mark.slow


def test_confidence_is_calibrated_on_clicks_that_were_left_out(page, place):
    """As by scikit-learn on the same folds, and evaluation/calibration.py."""
    representations, _ = truth(place)
    clicks = draw_clicks(place, 10)
    page.js("explore.view.auto = false")
    page.label(clicks)
    page.page.click("#learn")
    page.learned()
    valid = np.isfinite(representations).all(-1)
    rows, columns, codes = np.array(clicks).T
    x = representations[rows, columns] / np.sqrt(representations[valid].var(0).mean())
    fold = (np.arange(len(codes)) % 10 + codes - 1) % 5
    logits, order = [], np.argsort(fold, kind="stable")
    for number in range(5):
        model = LogisticRegression(max_iter=2000).fit(x[fold != number], codes[fold != number])
        logits.append(model.decision_function(x[fold == number]))
    wanted = fit_temperature(np.concatenate(logits), codes[order] - 1)
    assert page.js("explore.score.temperature") == pytest.approx(wanted, rel=0.05)
    page.page.check("input[name=method][value=nearest]", force=True)
    page.page.click("#learn")
    page.learned()
    assert page.js("explore.score.clicks") == len(clicks), "shares of neighbours stay as they are"


def test_a_stroke_weighs_as_much_as_a_click_in_the_temperature(page):
    """Two strokes of 40 pixels among clicks of one, as by scikit-learn and scipy."""
    rng, pixels = np.random.default_rng(0), np.array([1] * 10 + [40, 1] * 2 + [1] * 6)
    click = np.repeat(np.arange(20), pixels)
    target, fold = np.arange(20) // 10, (np.arange(20) % 10 + np.arange(20) // 10) % 5
    x = np.float32(rng.normal(2.0 * target[click] - 1, 2.0))[:, None]
    logits = np.empty(len(x))
    for held in (fold[click] == number for number in range(5)):
        model = LogisticRegression().fit(x[~held], target[click][~held])
        logits[held] = model.decision_function(x[held])

    def loss(log):
        wrong = np.logaddexp(0, (1 - 2 * target[click]) * logits / np.exp(log))
        return (wrong / pixels[click]).sum() + log**2

    wanted = np.exp(minimize_scalar(loss, bounds=np.log((0.1, 10)), method="bounded").x)
    rows = {"vectors": x.ravel().tolist(), "target": target[click].tolist()}
    training = {"method": "softmax", "k": 5, "size": 1, "deviation": 1, "classes": 2}
    task = """({ vectors, target, ...rest }) => explore.pool.one({ task: "score", training:
        { vectors: Float32Array.from(vectors), target: Uint8Array.from(target), ...rest } })"""
    found = page.js(task, training | rows | {"click": click.tolist()})
    assert found["temperature"] == pytest.approx(wanted, rel=0.02)
