"""Label next, in a browser: which pixels the page proposes to label, and the keys that do it."""

import numpy as np
import pytest
from browser import draw_clicks, label_count, make_page, random_map, save_map, truth
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

pytest_plugins = ["browser"]  # its fixtures
pytestmark = pytest.mark.slow
SIDE = 4  # pixels of a cell of a scene of 64 x 64, at first


def answer(page, key):
    """Press a key and wait for another proposal; returns its pixel."""
    before = page.js("explore.proposals.pixel")
    page.page.keyboard.press(key)
    page.until(f"![null, {before}].includes(explore.proposals.pixel)")
    return page.js("explore.proposals.pixel")


def test_proposes_the_least_margin_away_from_labels(page, place):
    representations, _ = truth(place)
    page.label(clicks := draw_clicks(place, 2))
    page.learned()
    valid = np.isfinite(representations).all(-1)
    x = representations[valid] / np.sqrt(representations[valid].var(0).mean())
    codes = np.zeros(valid.shape, int)
    for row, column, code in clicks:
        codes[row, column] = code
    model = LogisticRegression(max_iter=2000).fit(x[codes[valid] > 0], codes[codes > 0])
    two = np.sort(model.predict_proba(x))[:, -2:]
    margin = page.array("explore.found.prediction.margin").reshape(valid.shape) / 255
    assert spearmanr(margin[valid], two[:, 1] - two[:, 0]).statistic > 0.97
    margin[~valid] = np.inf
    taken = [(row, column) for row, column, _ in clicks]
    page.page.click("#labelNext")
    proposed = [page.js("explore.proposals.pixel")]
    proposed += [answer(page, "n") for _ in range(5)]
    for row, column in (divmod(pixel, 64) for pixel in proposed):
        far = np.ones(valid.shape, bool)
        for r, c in ((r // SIDE, c // SIDE) for r, c in taken):
            rows, columns = (slice(max(0, i - 1) * SIDE, (i + 2) * SIDE) for i in (r, c))
            far[rows, columns] = False
        assert margin[row, column] <= margin[far].min() + 1e-6
        assert far[row, column]
        assert valid[row, column]
        assert min(max(abs(row - r), abs(column - c)) for r, c in taken) > 1
        taken.append((row, column))
    assert page.page.is_visible("#year"), "the year of the pixel"
    assert page.js("explore.map.pixel") == dict(zip(("row", "column"), taken[-1], strict=True))


def test_number_keys_label_one_proposal_after_another(opened, place):
    """The same answers lead to the same pixels, and nothing is proposed twice."""
    runs = []
    for _ in range(2):
        page = opened(place / "explore.html")
        page.label(clicks := draw_clicks(place, 1)[:3])
        page.learned()
        assert page.page.is_hidden("#proposal")
        page.page.keyboard.press("n")
        assert "Which class?" in page.page.inner_text("#proposal")
        pixels = [page.js("explore.proposals.pixel")]
        pixels += [answer(page, key) for key in "12n31"]
        runs.append(pixels)
        assert len({*pixels}) == 6
        assert label_count(page) == len(clicks) + 4
        codes = page.js("pixels => pixels.map((p) => explore.labels.byPixel.get(p)?.code)", pixels)
        assert codes == [1, 2, None, 3, 1, None]
        page.page.keyboard.press("Escape")
        assert page.page.is_hidden("#proposal")
        page.page.keyboard.press("2")
        assert label_count(page) == len(clicks) + 4, "a number chooses a class again"
        page.context.close()
    assert runs[0] == runs[1]


def test_without_maps_at_once_the_next_proposal_needs_none(page, place):
    page.label(draw_clicks(place, 1)[:3])
    page.learned()
    page.js("explore.view.auto = false")
    page.page.keyboard.press("n")
    version, first = page.js("explore.learnedVersion"), page.js("explore.proposals.pixel")
    assert answer(page, "1") != first
    assert page.js("explore.learnedVersion") == version < page.js("explore.labels.version")


@pytest.mark.parametrize("method", ["softmax", "nearest"])
def test_proposals_end_where_nothing_is_left(opened, tmp_path, method):
    values = random_map((6, 9, 4))
    values[2:] = np.nan
    page = opened(make_page(representation_path=save_map(tmp_path, values)))
    page.page.keyboard.press("n")
    page.until("document.getElementById('status').textContent.includes('two classes first')")
    page.js(f"explore.view.method = '{method}'")
    page.label([(0, 0, 1), (0, 2, 2)])
    page.learned()
    if method == "nearest":  # one vote of two for each class
        assert set(page.array("explore.found.prediction.margin")[:18]) == {0}
    found = []
    while page.js("explore.proposals.next(), explore.proposals.going"):
        found.append(page.js("explore.proposals.pixel"))
    assert found and max(found) < 18, "pixels with data only"
    assert len({*found}) == len(found)
    assert not {0, 2} & {*found}
    assert "No pixel is left" in page.page.inner_text("#status")
