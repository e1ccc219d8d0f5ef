"""From a checkpoint to maps: fine-tuning, inference, false colour, reading the result."""

import json
import os
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import rasterio
import torch
from conftest import ROOT, make_dataset, make_tile
from test_train import tiny

import create_false_color_map
import infer
import label_efficiency
import read_inference_map
import train
import train_classification
import train_classification_maddy
from backbones import BACKBONES, HEADS, Classifier, build_backbone, focal_loss, load_backbone
from maps import read_representations
from runtime import InputError, Runtime, load_checkpoint

QUIET = {"device": "cpu", "wandb_mode": "disabled"}
GEO = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, -10, 5400000]}


def run(script, **keywords):
    config = {**script.run_config, "wandb_mode": "disabled"}
    unknown = set(keywords) - set(config)
    assert not unknown, unknown
    return script.main(
        {**config, **{k: str(v) if isinstance(v, os.PathLike) else v for k, v in keywords.items()}}
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Labelled, georeferenced tiles, a pretrained and a fine-tuned checkpoint."""
    path = tmp_path_factory.mktemp("workplace")
    make_dataset(path, shape=(20, 24, 16, 10), clear=0.8, **GEO)
    train.main(tiny(path, path / "pretrained", max_steps=8))
    fine_tune(path, "classifier", epochs=4)
    return path


def fine_tune(path, output, **keywords):
    keywords = {"checkpoint_path": path / "pretrained/best.pt", "dataset_name": "toy", **keywords}
    return run(
        train_classification, base_path=path, output_dir=path / output, device="cpu", **keywords
    )


def tile_of(path, number=0):
    return path / f"data/toy/processed/MGRS-{number}"


def map_tile(path, output, checkpoint="classifier", **keywords):
    keywords = {"tile_path": tile_of(path), "device": "cpu", **keywords}
    return run(
        infer,
        checkpoint_path=path / checkpoint / "best.pt",
        output_dir=path / output,
        **keywords,
    )


# ---- fine-tuning -------------------------------------------------------------------------------


def test_fine_tuning_starts_from_the_pretrained_weights(workplace, monkeypatch):
    """Defect 1: pretrained weights silently not loaded."""
    content = load_checkpoint(workplace / "pretrained/best.pt")
    started = {}
    fit = train_classification.fit

    def spy(run, *rest):
        started.update({k: v.clone() for k, v in run.model.backbone.state_dict().items()})
        return fit(run, *rest)

    monkeypatch.setattr(train_classification, "fit", spy)
    fine_tune(workplace, "start", epochs=1)
    assert started.keys() == content["backbone_state"].keys()
    assert all(started[key].equal(value) for key, value in content["backbone_state"].items())
    tuned = load_checkpoint(workplace / "start/best.pt")["backbone_state"]
    assert not all(tuned[key].equal(value) for key, value in started.items())


def test_a_frozen_backbone_stays_as_it_is(workplace):
    """Defect 9: a frozen backbone left in train mode."""
    fine_tune(workplace, "frozen", freeze_backbone=True, epochs=2, label_count=40)
    before = load_checkpoint(workplace / "pretrained/best.pt")["backbone_state"]
    after = load_checkpoint(workplace / "frozen/best.pt")["backbone_state"]
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
    keywords = {"head": head, "loss": loss, "class_weights": loss == "focal", "epochs": 12}
    scores = run(
        train_classification,
        checkpoint_path=workplace / "pretrained/best.pt",
        base_path=workplace,
        dataset_name="toy",
        output_dir=tmp_path / "out",
        backbone_learning_rate=3e-3,
        **QUIET,
        **keywords,
    )
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
    scores = run(
        train_classification,
        base_path=workplace,
        dataset_name="toy",
        output_dir=tmp_path / "out",
        epochs=1,
        min_valid=5,
        **QUIET,
        **keywords,
    )
    assert 0 <= scores["macro_f1"] <= 1
    folder = tmp_path / "maps"
    run(
        infer,
        checkpoint_path=tmp_path / "out/best.pt",
        tile_path=tile_of(workplace),
        output_dir=folder,
        **QUIET,
    )
    assert set(np.unique(np.load(folder / "classification_map.npy"))) <= {0, 40, 95}


def test_the_test_side_is_scored_once_and_chooses_nothing(workplace, tmp_path, monkeypatch):
    """Defect 8: the final score from the split used for selection."""
    seen = []
    predict = train_classification.predict

    def spy(classifier, dataset, *rest):
        seen.append(dataset.split)
        return predict(classifier, dataset, *rest)

    monkeypatch.setattr(train_classification, "predict", spy)
    fine_tune(workplace, "once", epochs=3, patience=0)
    assert seen == ["validation"] * 3 + ["test"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"checkpoint_path": ""}, "freeze_backbone=true: wanted a checkpoint_path"),
        ({"head": "tree"}, "head=tree: wanted one of linear, mlp, attention"),
        ({"label_count": 99999}, "labelled pixels .*wanted label_count=99999"),
        ({"dataset_name": "other"}, r"MGRS-0: found \['X0'.*X5'\], wanted \['X0'"),
        ({"dataset_name": "bare"}, "found no labels.npy"),
        ({"output_dir": "/proc/no"}, "output_dir=/proc/no: not writable"),
    ],
)
def test_mistakes_of_fine_tuning(workplace, keywords, message):
    if not (workplace / "data/bare").exists():
        make_dataset(workplace, name="bare", labels=False)
        make_dataset(workplace, name="other", shape=(20, 16, 16, 6))
    with pytest.raises(InputError, match=message) as error:
        run(
            train_classification,
            **{
                "checkpoint_path": workplace / "pretrained/best.pt",
                "base_path": workplace,
                "dataset_name": "toy",
                "freeze_backbone": True,
                "output_dir": workplace / "mistake",
                **QUIET,
                **keywords,
            },
        )
    assert "\n" not in str(error.value)


def test_a_finished_run_is_not_overwritten(workplace):
    with pytest.raises(InputError, match="another output_dir or overwrite=true"):
        fine_tune(workplace, "classifier", epochs=1)


# ---- inference -----------------------------------------------------------------------------------


def test_maps_of_a_tile(workplace):
    (folder,) = map_tile(workplace, "maps")
    valid = np.load(folder / "valid_count.npy")
    representations = np.load(folder / "representation_map.npy")
    class_map, confidence = (
        np.load(folder / f"{name}.npy") for name in ("classification_map", "confidence")
    )
    assert representations.shape == (24, 16, 16)
    covered = valid >= 5
    assert (np.isfinite(representations).all(-1) == covered).all()
    assert ((class_map > 0) == covered).all()
    assert set(np.unique(class_map[covered])) <= {40, 95}
    assert (np.isfinite(confidence) == covered).all()
    assert 0.5 <= confidence[covered].min() <= confidence[covered].max() <= 1
    assert not list(folder.glob(".*"))


def test_too_few_observations_are_no_data(workplace, tmp_path):
    """Defect 7: class 0 used for "no data"; defect 12: memory of uncovered pixels."""
    tile = make_tile(tmp_path / "MGRS-holes", (20, 24, 16, 10), clear=0.9)
    masks = np.load(tile / "masks.npy")
    masks[:, 12:] = 0
    masks[4:, :, :3] = 0
    np.save(tile / "masks.npy", masks)
    (folder,) = map_tile(workplace, "holes", tile_path=tile)
    missing = masks.sum(0) < 5
    assert missing[12:].all()
    assert (np.load(folder / "classification_map.npy")[missing] == 0).all()
    assert np.isnan(np.load(folder / "representation_map.npy")[missing]).all()
    picture = create_false_color_map.MapOnDisk(folder / "representation_map.npy")
    run(create_false_color_map, representation_path=picture.path, device="cpu")
    assert ((plt.imread(folder / "false_color.png")[..., 3] == 0) == missing).all()


def test_the_same_map_whatever_the_blocks(workplace, monkeypatch):
    """Blocks of rows, batches of series and their padding are matters of speed alone."""
    (one,) = map_tile(workplace, "blocks1")
    for name, value in {"block_pixels": 48, "batch_dates": 40, "pad_dates": 8}.items():
        monkeypatch.setattr(Runtime, name, value)
    (other,) = map_tile(workplace, "blocks2")
    np.testing.assert_allclose(
        np.load(one / "representation_map.npy"),
        np.load(other / "representation_map.npy"),
        atol=1e-5,
    )
    (again,) = map_tile(workplace, "blocks3")
    for name in ("representation_map", "classification_map"):
        assert (other / f"{name}.npy").read_bytes() == (again / f"{name}.npy").read_bytes()


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_smaller_formats(workplace, kind):
    (full,) = map_tile(workplace, "full")
    (small,) = map_tile(workplace, f"small-{kind}", representation_format=kind)
    wanted = np.load(full / "representation_map.npy")
    assert np.load(small / "representation_map.npy").dtype == kind
    found = read_representations(small / "representation_map.npy")
    assert (np.isnan(found) == np.isnan(wanted)).all()
    valid = np.isfinite(wanted[..., 0])
    a, b = found[valid], wanted[valid]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.999
    if kind == "int8":
        scales = np.load(small / "representation_map_scales.npy")
        assert scales.shape == (24, 16)
        assert scales.dtype == np.float32


def test_geotiffs_have_place_colours_and_names(workplace):
    (folder,) = map_tile(workplace, "geo")
    with rasterio.open(folder / "classification_map.tif") as file:
        assert file.crs.to_string() == "EPSG:32631"
        assert file.transform[:6] == (10, 0, 500000, 0, -10, 5400000)
        assert file.nodata == 0
        assert file.profile["tiled"]
        assert file.profile["compress"] == "deflate"
        assert file.colormap(1)[95][:3] == (0x00, 0xCF, 0x75)
        np.testing.assert_array_equal(file.read(1), np.load(folder / "classification_map.npy"))
    names = (folder / "classification_map.tif.aux.xml").read_text()
    assert names.count("<Category>") + names.count("<Category />") == 96
    assert "Cropland" in names
    with rasterio.open(folder / "confidence.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.load(folder / "confidence.npy"))
    run(create_false_color_map, representation_path=folder / "representation_map.npy")
    with rasterio.open(folder / "false_color.tif") as file:
        assert file.count == 4
        assert file.transform[2] == 500000


def test_folders_of_tiles_and_tiles_already_done(workplace, capsys):
    folders = map_tile(workplace, "all", tile_path=tile_of(workplace).parent)
    assert [folder.name for folder in folders] == ["MGRS-0", "MGRS-1"]
    before = {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}
    map_tile(workplace, "all", tile_path=tile_of(workplace).parent)
    assert capsys.readouterr().out.count("done already") == 2
    assert before == {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}
    with pytest.raises(InputError, match="made with another representation_format"):
        map_tile(
            workplace, "all", tile_path=tile_of(workplace).parent, representation_format="int8"
        )
    map_tile(workplace, "all", tile_path=tile_of(workplace).parent, overwrite=True)
    assert before != {f: (f / "representation_map.npy").stat().st_mtime_ns for f in folders}


def test_bad_tiles_are_skipped_when_asked(workplace, tmp_path, capsys):
    for number in (0, 1):
        make_tile(tmp_path / f"tiles/MGRS-{number}", (20, 8, 8, 10 if number else 6))
    with pytest.raises(InputError, match="MGRS-0: found"):
        map_tile(workplace, "bad", tile_path=tmp_path / "tiles")
    (done,) = map_tile(workplace, "bad", tile_path=tmp_path / "tiles", skip_bad_tiles=True)
    assert done.name == "MGRS-1"
    assert "skipped" in capsys.readouterr().out


def test_a_killed_run_leaves_nothing_that_looks_finished(workplace, tmp_path):
    tile = make_tile(tmp_path / "MGRS-big", (20, 400, 200, 10), labels=False)
    command = [sys.executable, str(ROOT / "infer.py"), f"tile_path={tile}"]
    command += [f"checkpoint_path={workplace / 'classifier/best.pt'}", "wandb_mode=disabled"]
    command += [f"output_dir={tmp_path / 'out'}", "device=cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob(".valid_count*")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() != 0
    assert not list((tmp_path / "out").glob("[!.]*.npy"))
    assert not (tmp_path / "out/infer.json").exists()
    map_tile(workplace, "killed", tile_path=tile)


def test_torchrun_divides_a_folder_of_tiles(workplace, tmp_path):
    map_tile(workplace, "one", tile_path=tile_of(workplace).parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "infer.py"), f"tile_path={tile_of(workplace).parent}", "device=cpu"]
    command += [f"checkpoint_path={workplace / 'classifier/best.pt'}", "wandb_mode=disabled"]
    command += [f"output_dir={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        name = f"MGRS-{number}/representation_map.npy"
        np.testing.assert_allclose(
            np.load(tmp_path / name), np.load(workplace / "one" / name), atol=1e-5
        )


def test_mistakes_of_inference(workplace, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes((workplace / "classifier/best.pt").read_bytes()[:5000])
    foreign = tmp_path / "foreign.pt"
    torch.save({"weights": torch.ones(2)}, foreign)
    pretrained = workplace / "pretrained/best.pt"
    for keywords, message in [
        ({"checkpoint_path": cut}, "cut.pt: found no whole checkpoint"),
        ({"checkpoint_path": foreign}, "of another program"),
        (
            {"checkpoint_path": pretrained, "classify": "true"},
            "found a pretrained checkpoint, wanted a classifier one",
        ),
        ({"tile_path": tmp_path}, "found no tile"),
        ({"output_dir": "/proc/no"}, "not writable"),
    ]:
        standard = {
            "checkpoint_path": workplace / "classifier/best.pt",
            "tile_path": tile_of(workplace),
            "output_dir": tmp_path / "out",
        }
        with pytest.raises(InputError, match=message) as error:
            run(infer, **standard | keywords)
        assert "\n" not in str(error.value)


# ---- false colour --------------------------------------------------------------------------------


def test_tiles_that_share_pixels_get_equal_colours_there(workplace, tmp_path):
    whole = make_tile(tmp_path / "tiles/MGRS-whole", (20, 24, 24, 10))
    for name, columns in (("west", slice(0, 16)), ("east", slice(8, 24))):
        part = make_tile(tmp_path / f"tiles/MGRS-{name}", (20, 24, 16, 10))
        for file in ("bands", "masks"):
            np.save(part / f"{file}.npy", np.load(whole / f"{file}.npy")[:, :, columns])
        np.save(part / "doys.npy", np.load(whole / "doys.npy"))
    map_tile(workplace, "seam", tile_path=tmp_path / "tiles", checkpoint="pretrained")
    maps = {
        name: workplace / f"seam/MGRS-{name}/representation_map.npy" for name in ("west", "east")
    }
    basis = tmp_path / "basis.npz"
    run(create_false_color_map, representation_path=maps["west"], basis_path=basis)
    assert basis.exists()
    run(create_false_color_map, representation_path=maps["east"], basis_path=basis)
    west, east = (plt.imread(path.parent / "false_color.png") for path in maps.values())
    np.testing.assert_allclose(west[:, 8:], east[:, :8], atol=1.01 / 255)
    assert west[..., :3].std() > 0.1


def test_false_colour_straight_from_a_checkpoint_and_from_int8(workplace, tmp_path):
    (full,) = map_tile(workplace, "fc", checkpoint="pretrained")
    (small,) = map_tile(workplace, "fc8", checkpoint="pretrained", representation_format="int8")
    basis = tmp_path / "basis.npz"
    pictures = []
    for name, keywords in {
        "map": {"representation_path": full / "representation_map.npy"},
        "int8": {"representation_path": small / "representation_map.npy"},
        "tile": {
            "checkpoint_path": workplace / "pretrained/best.pt",
            "tile_path": tile_of(workplace),
        },
    }.items():
        out = tmp_path / name
        run(create_false_color_map, basis_path=basis, output_dir=out, device="cpu", **keywords)
        pictures.append(plt.imread(out / "false_color.png"))
    np.testing.assert_allclose(pictures[0], pictures[2], atol=1.01 / 255)
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.02
    with pytest.raises(InputError, match="wanted representation_path=, or checkpoint_path="):
        run(create_false_color_map)


# ---- reading maps, the simple loop, label efficiency ---------------------------------------------


def test_areas_and_agreement(workplace, capsys):
    (folder,) = map_tile(workplace, "read")
    result = run(read_inference_map, map_path=folder / "classification_map.npy", show=True)
    class_map = np.load(folder / "classification_map.npy")
    assert result["areas"]["95"]["hectares"] == pytest.approx((class_map == 95).sum() * 0.01)
    labels = np.load(tile_of(workplace) / "labels.npy")
    both = class_map > 0
    accuracy = (labels == class_map)[both].mean()
    assert result["agreement"]["overall_accuracy"] == pytest.approx(accuracy)
    out = capsys.readouterr().out
    assert "no display to open a window on" in out
    assert " ha" in out
    np.save(folder / "wrong.npy", labels[:5])
    with pytest.raises(InputError, match=r"wrong.npy: found shape \(5, 16\), wanted \(24, 16\)"):
        run(
            read_inference_map,
            map_path=folder / "classification_map.npy",
            labels_path=folder / "wrong.npy",
        )


def test_areas_are_pixels_where_the_size_is_unknown(tmp_path, capsys):
    np.save(tmp_path / "map.npy", np.array([[0, 10], [10, 3]], np.uint8))
    result = run(read_inference_map, map_path=tmp_path / "map.npy")
    assert result["areas"]["10"]["pixels"] == 2
    assert result["areas"]["10"]["hectares"] is None
    assert result["areas"]["3"]["name"] == "class 3"
    assert "2 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_the_simple_loop(workplace, tmp_path, loss):
    (folder,) = map_tile(workplace, f"maddy-{loss}", checkpoint="classifier")
    keywords = {
        "representation_path": folder / "representation_map.npy",
        "labels_path": tile_of(workplace) / "labels.npy",
        "output_dir": tmp_path / "out",
        "loss": loss,
        "batch_size": 32,
    }
    scores = run(train_classification_maddy, **keywords)
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert {"loss", "overall_accuracy", "macro_f1"} <= set(json.loads(lines[-1]))
    assert sum(row["support"] for row in scores["per_class"].values()) == round(0.2 * 24 * 16)
    splits = np.ones((24, 16), np.uint8)
    splits[:6] = 3
    np.save(tmp_path / "splits.npy", splits)
    scores = run(train_classification_maddy, splits_path=tmp_path / "splits.npy", **keywords)
    assert sum(row["support"] for row in scores["per_class"].values()) == 6 * 16
    assert len((ROOT / "train_classification_maddy.py").read_text().splitlines()) < 150


def test_focal_loss_is_cross_entropy_at_gamma_0_and_smaller_above():
    logits, target = torch.randn(50, 3), torch.randint(3, (50,))
    plain = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(focal_loss(logits, target, 0.0), plain)
    chance = logits.softmax(1)[torch.arange(50), target]
    wanted = -((1 - chance) ** 2 * chance.log()).mean()
    torch.testing.assert_close(focal_loss(logits, target, 2.0), wanted)
    weight = torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(
        focal_loss(logits, target, 0.0, weight),
        torch.nn.functional.cross_entropy(logits, target, weight=weight),
    )


def test_label_efficiency_compares_with_baselines(workplace, tmp_path):
    results = run(
        label_efficiency,
        checkpoint_path=workplace / "pretrained/best.pt",
        base_path=workplace,
        dataset_name="toy",
        output_dir=tmp_path / "out",
        label_counts="20,60",
        seeds=2,
        device="cpu",
    )
    assert len(results) == 2 * 2 * 3
    assert {row["model"] for row in results} == set(label_efficiency.models(0))
    assert all(0 <= row["macro_f1"] <= 1 for row in results)
    assert (tmp_path / "out/label_efficiency.png").exists()


def test_all_clear_observations_or_averaged_draws(workplace):
    """Both ways at inference give maps of the same tile that agree on most pixels."""
    (every,) = map_tile(workplace, "every")
    (drawn,) = map_tile(workplace, "drawn", draws=4)
    a, b = (np.load(folder / "classification_map.npy") for folder in (every, drawn))
    assert ((a == 0) == (b == 0)).all()
    assert (a == b).mean() > 0.8


def test_attention_head_needs_steps():
    backbone = build_backbone("mlp", num_bands=4, sample_size=6, latent_dim=8, width=16, depth=1)
    with pytest.raises(ValueError, match="not mlp"):
        Classifier(backbone, head="attention", num_classes=2, dropout=0.0)


@pytest.mark.parametrize("script", ["infer", "create_false_color_map", "read_inference_map"])
def test_scripts_log_their_pictures_to_wandb(workplace, tmp_path, script):
    from test_train import read_wandb

    (folder,) = map_tile(workplace, f"wandb-{script}")
    out = tmp_path / "out"
    keywords = {
        "infer": {
            "checkpoint_path": str(workplace / "classifier/best.pt"),
            "tile_path": str(tile_of(workplace)),
            "device": "cpu",
        },
        "create_false_color_map": {"representation_path": str(folder / "representation_map.npy")},
        "read_inference_map": {"map_path": str(folder / "classification_map.npy")},
    }[script]
    module = {m.__name__: m for m in (infer, create_false_color_map, read_inference_map)}[script]
    module.main({**module.run_config, **keywords, "output_dir": str(out), "wandb_mode": "offline"})
    _, files = read_wandb(out)
    pictures = [file for file in files if file.suffix == ".png"]
    assert pictures
    assert all(file.exists() for file in pictures)
