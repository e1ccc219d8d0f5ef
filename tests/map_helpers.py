"""What the tests of faults of maps share: a small tile, checkpoints drawn at random, runs."""

import json
import os
from pathlib import Path

from running.checkpoints import save_checkpoint
from running.errors import InputError

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import infer
from backbones import Classifier, build_backbone
from evaluation.applicability import describe_labels
from maps.pictures import find_frame

BANDS = ["B02", "B03", "B04", "B08"]
GEO = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, -10, 5400000]}
CLASSES = {"40": {"name": "Cropland", "color": "#f096ff"}, "95": {"name": "Mangroves"}}


def make_tile(folder, height=24, width=16, seed=0, **info):
    """A georeferenced tile of 12 dates with labels 40 and 95; returns its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    shape = (12, height, width, len(BANDS))
    masks = (rng.random(shape[:3]) < 0.7).astype(np.uint8)
    masks[:, :, 0] = 0
    arrays = {
        "bands": rng.integers(1, 5000, shape, np.uint16),
        "masks": masks,
        "doys": np.arange(1, 361, 30, dtype=np.int16),
        "band_mean": np.full(len(BANDS), 2500, np.float32),
        "band_std": np.full(len(BANDS), 1400, np.float32),
        "labels": rng.choice([40, 95], (height, width)).astype(np.uint8),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "tile.json").write_text(json.dumps({"bands": BANDS, **GEO, **info}))
    return folder


def make_checkpoints(folder, seed=0):
    """pretrained.pt and classifier.pt, of weights drawn at random."""
    torch.manual_seed(seed)
    arguments = {"name": "transformer", "num_bands": len(BANDS), "sample_size": 4}
    arguments |= {"latent_dim": 8, "width": 16, "depth": 1}
    backbone = build_backbone(**arguments)
    head = {"head": "linear", "num_classes": 2, "dropout": 0.0}
    classifier = Classifier(backbone, **head)
    content = {
        "config": {"sample_size": 8, "min_valid": 3, "block_size": 4, "split_seed": 0},
        "backbone": arguments,
        "backbone_state": backbone.state_dict(),
        "bands": BANDS,
        "mean": torch.full((len(BANDS),), 2500.0),
        "std": torch.full((len(BANDS),), 1400.0),
    }
    save_checkpoint(folder / "pretrained.pt", "pretrained", **content)
    content |= {"head": head, "head_state": classifier.head.state_dict(), "classes": CLASSES}
    y = np.random.default_rng(seed).normal(size=(20, 8))
    content["applicability"] = describe_labels(y, np.arange(20))
    save_checkpoint(folder / "classifier.pt", "classifier", **content)


def make_place(path):
    """Write a tile MGRS-A and two pairs of checkpoints, in . and other/; returns the folder."""
    (path / "other").mkdir()
    make_tile(path / "MGRS-A")
    make_checkpoints(path)
    make_checkpoints(path / "other", seed=1)
    return path


def run(script, **keywords):
    config = {**script.run_config, "wandb_mode": "disabled", "device": "cpu"}
    config = {key: value for key, value in config.items() if key in script.run_config}
    assert not set(keywords) - set(config)
    return script.main(
        config | {k: str(v) if isinstance(v, os.PathLike) else v for k, v in keywords.items()}
    )


def map_tile(place, output_dir, checkpoint="classifier", **keywords):
    keywords = {"tile_path": place / "MGRS-A", **keywords}
    checkpoint_path = place / f"{checkpoint}.pt"
    return run(infer, checkpoint_path=checkpoint_path, output_dir=output_dir, **keywords)


def map_in(picture, shape, number=0, count=1):
    """The colours of a map (H, W) in a PNG of maps/pictures.py, (h, w, 3) uint8.

    Of the middle of each drawn pixel: a line around the map covers the edge of the outer ones.
    number: of the `count` maps of a picture.
    """
    frame, image = find_frame(shape, count), plt.imread(picture)[..., :3]
    left, top = frame.corner(number)
    rows = slice(top + frame.factor // 2, top + frame.height, frame.factor)
    columns = slice(left + frame.factor // 2, left + frame.width, frame.factor)
    return (image[rows, columns] * 255).round().astype(np.uint8)


def refused(match, function, *arguments, **keywords):
    """The one line of the InputError that is wanted."""
    with pytest.raises(InputError, match=match) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder):
    """{path: content} of all files in a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def as_words(**keywords):
    """The arguments of a command line."""
    keywords = {"wandb_mode": "disabled", "device": "cpu", **keywords}
    return [f"{key}={value}" for key, value in keywords.items() if value is not None]
