"""Overrides, checkpoints, RankMe, representations, false colour, and the manners of all modules."""

import ast
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tile

import make_demo_data
from backbones import BACKBONES, build_backbone
from data import (
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from maps import WORLDCOVER, apply_basis, class_legend, fit_basis
from reports import score_classes
from runtime import (
    InputError,
    atomic_write,
    check,
    load_checkpoint,
    override,
    save_checkpoint,
    start_runtime,
)
from tiles import Tile, open_dataset
from utils import encode_series, extract_representations, rankme

PYTHON_FILES = sorted(ROOT.glob("*.py"))


def test_override_keeps_the_type_of_the_default():
    default = {"a": 1, "b": 0.5, "c": "x", "d": False}
    config = override(default, ["a=3", "b=2", "c=y=z", "d=TRUE"])
    assert config == {"a": 3, "b": 2.0, "c": "y=z", "d": True}
    assert type(config["b"]) is float
    assert default == {"a": 1, "b": 0.5, "c": "x", "d": False}
    for wrong in ("a=1.5", "b=x", "d=1", "e=1", "a", "=1"):
        with pytest.raises(InputError, match="wanted"):
            override(default, [wrong])


def test_a_frozen_config_cannot_change():
    with pytest.raises(TypeError):
        check({"seed": 1})["seed"] = 2


def test_atomic_write_leaves_nothing_half(tmp_path):
    target = tmp_path / "file.npy"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoints_of_others_are_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"format": 99, "kind": "pretrained"}, tmp_path / "newer.pt")
    torch.save({"run": subprocess.Popen}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    save_checkpoint(tmp_path / "ours.pt", "pretrained", step=1)
    for name, message in {
        "foreign.pt": "of another program",
        "newer.pt": "found format 99, wanted 1",
        "code.pt": "no whole checkpoint",
        "text.pt": "no whole checkpoint",
        "none.pt": "found no file",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert load_checkpoint(tmp_path / "ours.pt")["step"] == 1
    with pytest.raises(InputError, match="a pretrained checkpoint, wanted a classifier one"):
        load_checkpoint(tmp_path / "ours.pt", ("classifier",))


def test_rankme_counts_equal_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2000, 16, generator=generator)).Q
    rank, share = rankme(basis)
    assert rank == pytest.approx(16, rel=1e-3)
    assert share == pytest.approx(1, rel=1e-3)
    basis[:, 4:] = 0
    assert rankme(basis)[0] == pytest.approx(4, rel=1e-3)


@pytest.fixture
def tile(tmp_path):
    return Tile(make_tile(tmp_path / "MGRS-1", (24, 20, 16, 4), clear=0.5))


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    sizes = {"num_bands": 4, "sample_size": 6, "latent_dim": 8, "width": 16, "depth": 1}
    return build_backbone(request.param, **sizes).eval()


def test_representations_cover_just_the_valid_pixels(tile, backbone):
    """Defect 12: uninitialised memory for uncovered pixels; defect 11: zero vectors."""
    mean, std = torch.from_numpy(tile.band_mean), torch.from_numpy(tile.band_std)
    seen = np.zeros((20, 16), int)
    for _, row, column, y, _ in extract_representations(
        backbone, tile, mean, std, 10, start_runtime("cpu")
    ):
        seen[row, column] += 1
        assert y.shape == (len(row), 8)
        assert y.isfinite().all()
    assert (seen == (tile.clear_counts() >= 10)).all()


def test_inference_is_like_the_labelled_data_set(tmp_path, backbone):
    """Defect 3: training standardises and sorts its input, inference does not."""
    folder = tmp_path / "data/toy/processed/MGRS-1"
    tile = Tile(make_tile(folder, (24, 20, 16, 4), clear=0.5))
    runtime = start_runtime("cpu")
    dataset = SentinelTimeSeriesDatasetForDownstreaming(
        tmp_path, "toy", split="train", block_size=4
    )
    mapped = np.full((20, 16, 8), np.nan, np.float32)
    for _, row, column, y, _ in extract_representations(
        backbone, tile, dataset.mean, dataset.std, 10, runtime
    ):
        mapped[row, column] = y.numpy()
    for x, doys, *_ in iterate_batches(dataset):
        y, _ = encode_series(backbone, x, doys, runtime)
        pixel = (x[:, 0, -1] * dataset.std[-1] + dataset.mean[-1]).round().long().numpy() - 1
        np.testing.assert_allclose(y, mapped.reshape(-1, 8)[pixel], atol=1e-4)


def test_false_color_is_ruled_neither_by_outliers_nor_by_missing_pixels():
    """Defect 11: zero vectors dominate the PCA, a min-max stretch follows outliers."""
    rng = np.random.default_rng(0)
    representations = rng.normal(5, 1, (40, 40, 6)).astype(np.float32)
    plain = apply_basis(fit_basis(representations.reshape(-1, 6)), representations)
    representations[:10] = np.nan
    representations[20, 20] = 60
    valid = np.isfinite(representations[..., 0])
    rgba = apply_basis(fit_basis(representations[valid]), representations)
    assert (rgba[:10] == 0).all()
    assert (rgba[10:, :, 3] == 255).all()
    spread = rgba[10:, :, :3].reshape(-1, 3).std(0)
    assert (spread > 0.7 * plain[..., :3].reshape(-1, 3).std(0)).all(), spread


def test_legends_come_from_the_tile_or_from_worldcover():
    """Defect 7: labels through three different maps in three files; 0 is never a class."""
    assert class_legend([0, 40, 95], {}) == {
        40: {"name": "Cropland", "color": "#f096ff"},
        95: {"name": "Mangroves", "color": "#00cf75"},
    }
    told = class_legend([2, 3], {"2": {"name": "Corn"}, "3": {"name": "Rice", "color": "#123456"}})
    assert told[2]["name"] == "Corn"
    assert told[2]["color"].startswith("#")
    assert told[3] == {"name": "Rice", "color": "#123456"}
    assert class_legend([7], {"2": {"name": "Corn"}})[7]["name"] == "class 7"


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


# ---- README and simulated tiles ------------------------------------------------------------------


def readme_commands():
    """(script, [key=value, ..]) of every command in the README's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    words = " ".join(blocks).replace("\\\n", " ").replace("&&", "\n")
    for line in words.splitlines():
        if found := re.search(r"(\w+)\.py(.*)", line):
            yield found[1], [word for word in found[2].split() if "=" in word]


def test_the_commands_of_the_readme_have_keys_that_exist():
    commands = list(readme_commands())
    assert {"train", "train_classification", "infer", "create_false_color_map"} <= {
        script for script, _ in commands
    }
    for script, arguments in commands:
        override(importlib.import_module(script).run_config, arguments)


def test_the_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).exists(), path


def test_simulated_tiles(tmp_path):
    config = {**make_demo_data.run_config, "base_path": str(tmp_path), "size": 48, "num_tiles": 2}
    make_demo_data.main(config)
    tiles = open_dataset(tmp_path, "simulated")
    assert [tile.name for tile in tiles] == ["MGRS-SIM1", "MGRS-SIM2"]
    for tile in tiles:
        assert tile.shape == (60, 48, 48, 11)
        assert "(simulated)" in tile.title
        assert tile.info["crs"].startswith("EPSG:")
        assert len(set(np.diff(tile.doys).tolist())) > 1, "irregular dates"
        assert set(np.unique(tile.labels)) <= set(WORLDCOVER)
        assert (tile.bands[tile.masks == 1] > 0).all()
        masks = tile.masks.astype(bool)
        alike = (masks[:, 1:] == masks[:, :-1]).mean()
        assert alike > 0.9, "clouds hang together in space"
        blue = tile.bands[..., 1]
        assert ((blue > 4000) & masks).sum() > 20, "some clouds are left undetected"
    assert not np.array_equal(tiles[0].labels, tiles[1].labels)
    with pytest.raises(InputError, match="exists already"):
        make_demo_data.main(config)


# ---- manners -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_importing_does_no_work(path, tmp_path):
    """Defect 13: work done at import, so that nothing can be tested."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {path.stem}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_manners(path):
    """Defect 13: hard-coded devices and absolute paths; and scripts import no scripts."""
    tree = ast.parse(path.read_text())
    scripts = {file.stem for file in PYTHON_FILES if "\nif __name__ ==" in file.read_text()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & scripts
        if isinstance(node, ast.Attribute) and path.name != "runtime.py":
            assert node.attr != "cuda"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/home", "/mnt", "/data/", "cuda:"))
