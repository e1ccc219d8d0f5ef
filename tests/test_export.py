"""What export.py writes: the same numbers without this repository, and nothing that differs."""

import json
import re
import shutil
import subprocess
import sys

from running.checkpoints import load_checkpoint, save_checkpoint
from running.errors import InputError
from running.files import file_hash

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import ROOT, fine_tune, make_dataset, map_tile, run, save, tile_of, tiny

import export
import train
import train_regression
from trained.encoder import Encoder

ONNX, WEIGHTS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs/export.md").read_text(), re.DOTALL | re.MULTILINE
)


@pytest.fixture(scope="module")
def exported(workplace, tmp_path_factory):
    """The fine-tuned checkpoint of the fixture `workplace`, exported: what lies in its folder."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(workplace / "classifier", folder / "classifier")
    assert run(export, checkpoint_path=folder / "classifier/best.pt") == (
        folder / "classifier/exported"
    )
    return folder / "classifier/exported"


@pytest.fixture
def as_in_docs(workplace, exported, tmp_path, monkeypatch):
    """A folder with the names that the page has, which is the current one."""
    links = {"checkpoints/landcover": exported.parent}
    links |= {"data/simulated/processed/MGRS-SIM1": tile_of(workplace)}
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_onnx_gives_the_map_of_infer_without_this_repository(workplace, as_in_docs):
    """The page's code, in a Python that finds no module of ours: -I leaves out its folder."""
    code = f"{ONNX}\nimport sys\nassert 'torch' not in sys.modules\n"
    code += "np.savez('found.npz', embeddings=embeddings, codes=codes)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = map_tile(workplace, as_in_docs / "map")
    found = np.load("found.npz")
    wanted = np.load(folder / "representation_map.npy")
    np.testing.assert_allclose(found["embeddings"], wanted, atol=1e-5)
    assert (found["codes"] == np.load(folder / "classification_map.npy")).all()


def test_weights_and_config_build_the_same_network(workplace, as_in_docs):
    names = {}
    exec(WEIGHTS, names)
    encoder = Encoder.load(workplace / "classifier/best.pt", device="cpu")
    for name, part in encoder.module.state_dict().items():
        assert part.equal(names["network"].state_dict()[name]), name
    config = names["config"]
    assert config["checkpoint_sha256"] == file_hash(workplace / "classifier/best.pt")
    assert torch.tensor(config["mean"]).equal(encoder.checkpoint["mean"])
    assert torch.tensor(config["std"]).equal(encoder.checkpoint["std"])
    assert (config["bands"], config["min_valid"]) == (encoder.bands, encoder.min_valid)
    card = as_in_docs / "checkpoints/landcover/exported/README.md"
    assert card.read_bytes() == (workplace / "classifier/model_card.md").read_bytes()


def test_the_graph_knows_what_is_not_clear(workplace, exported):
    """NaN, zeros, padding anywhere, two observations of one day, any number of dates and pixels."""
    encoder = Encoder.load(workplace / "classifier/best.pt", device="cpu")
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    for shape in ((60, 30), (1, 50), (3, encoder.min_valid), (4, 1)):
        rng = np.random.default_rng(shape[1])
        series = rng.integers(1000, 5000, (*shape, 10)).astype(np.float32)
        days, clear = rng.choice([0, 9, 9, 300, 40, 366], shape), rng.random(shape) < 0.8
        series[rng.random(shape) < 0.1, 3], series[rng.random(shape) < 0.1] = np.nan, 0
        inputs = {"reflectance": series, "days": days, "clear": clear}
        wanted, found = encoder.encode(series, days, clear), session.run(None, inputs)
        for one, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_graph_that_differs_is_not_kept(workplace, exported, tmp_path, monkeypatch):
    """As if the exporter had lost a hundredth of the reflectance."""
    content = load_checkpoint(workplace / "classifier/best.pt")
    content["mean"] = content["mean"] * 0.99
    save_checkpoint(tmp_path / "best.pt", content.pop("kind"), **content)
    monkeypatch.setattr(
        export,
        "write_onnx",
        lambda encoder, path, dates: shutil.copy(exported / "model.onnx", path),
    )
    with pytest.raises(InputError, match=r"model.onnx: found a difference of .* in embedding") as e:
        run(export, checkpoint_path=tmp_path / "best.pt")
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "exported").iterdir())


def test_a_missing_package_is_named(workplace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="onnxruntime: not installed, wanted pip install -r") as e:
        run(export, checkpoint_path=workplace / "pretrained/best.pt", output_dir=tmp_path / "out")
    assert str(e.value).endswith("requirements-export.txt")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="found last.pt of a training, wanted another output_dir"):
        monkeypatch.undo()
        path = workplace / "pretrained/best.pt"
        run(export, checkpoint_path=path, output_dir=workplace / "pretrained")


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["cnn", "mlp"])
def test_backbones_that_take_a_fixed_number_of_dates(workplace, tmp_path, backbone):
    train.main(tiny(workplace, tmp_path, max_steps=2, backbone=backbone))
    folder = run(export, checkpoint_path=tmp_path / "best.pt", dates=0)
    assert json.loads((folder / "config.json").read_text())["draws"] == 8


@pytest.mark.slow
def test_attention_heads_and_seasons(workplace, tmp_path):
    """A season across New Year; the export checks itself."""
    season = {"start": "250", "end": "100", "min_valid": 3}
    fine_tune(workplace, tmp_path, epochs=1, head="attention", **season)
    config = json.loads(
        (run(export, checkpoint_path=tmp_path / "best.pt") / "config.json").read_text()
    )
    assert config["season"] == [250, 100]


@pytest.mark.slow
def test_a_quantity(tmp_path):
    make_dataset(tmp_path, shape=(12, 20, 16, 6), tiles=1)
    targets = np.random.default_rng(0).normal(3e4, 20, (20, 16)).astype(np.float32)
    save(tile_of(tmp_path), "targets", targets)
    train.main(tiny(tmp_path, tmp_path / "pretrained", max_steps=2))
    keys = {"base_path": tmp_path, "dataset_name": "toy", "epochs": 1, "block_size": 4}
    path = tmp_path / "pretrained/best.pt"
    run(train_regression, checkpoint_path=path, output_dir=tmp_path / "regressor", **keys)
    folder = run(export, checkpoint_path=tmp_path / "regressor/best.pt")
    outputs = onnxruntime.InferenceSession(folder / "model.onnx").get_outputs()
    assert [part.name for part in outputs] == ["embedding", "value"]


@pytest.mark.parametrize(("name", "difference"), [("embedding", 2e-5), ("probability", 2e-4)])
def test_a_small_difference_is_refused_too(workplace, tmp_path, monkeypatch, name, difference):
    monkeypatch.setattr(export, "write_onnx", lambda encoder, path, dates: path.write_bytes(b"-"))
    monkeypatch.setattr(export, "measure_differences", lambda *_: {name: difference})
    with pytest.raises(InputError, match=f"a difference of {difference:.2g} in {name}"):
        path = workplace / "classifier/best.pt"
        run(export, checkpoint_path=path, output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_differences_are_logged(exported):
    (line,) = map(json.loads, (exported / "metrics.jsonl").read_text().splitlines())
    assert 0 < line["difference_embedding"] <= 1e-5
    assert 0 < line["difference_probability"] <= 1e-4
