"""Faults of a long run on a shared cluster: nothing is lost, and nothing goes wrong in silence."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from running import files
from running.checkpoints import cut_metrics, load_checkpoint
from running.device import Runtime
from running.errors import InputError, Stopped
from running.log import RunLog

import numpy as np
import pytest
import torch
from helpers import (
    ENVIRONMENT,
    ROOT,
    Fork,
    as_arguments,
    assert_same_weights,
    fine_tune,
    fork_ranks,
    lines,
    make_dataset,
    make_tile,
    run,
    run_ranks,
    save,
    save_small_checkpoint,
    start,
    tile_of,
    tiny,
    wait_for_lines,
    weights,
)

import label_efficiency
import tiles
import train
import train_classification
from data import SHARDS, SentinelTimeSeriesDataset, iterate_batches
from evaluation import classifiers, features, tasks
from evaluation.validation import find_folds
from tiles import Tile
from training import finetuning as loop


@contextmanager
def small_disk(folder, size):
    """A disk of its own at `folder`, of `size` bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- lost work -----------------------------------------------------------------------------------


def start_and_wait(config, number, start_script=Fork):
    """train.py in a process group of its own, once `number` lines are logged."""
    process = start_script(*as_arguments(config), start_new_session=True)
    wait_for_lines(Path(config["output_dir"]), number, process)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_signal_to_all_processes_of_a_job_loses_nothing(dataset, undisturbed, tmp_path, workers):
    """Regression: the loader workers died first, and all since the last checkpoint was lost."""
    config = tiny(dataset, tmp_path / "stopped", epochs=30, num_workers=workers)
    config |= {"checkpoint_interval": 1000, "val_interval": 1000}
    process = start_and_wait(config, 10)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "resumes" in out
    assert "Traceback" not in err
    step = lines(tmp_path / "stopped")[-1]["step"]
    assert load_checkpoint(tmp_path / "stopped/last.pt")["step"] == step > 8
    train.main(config)
    assert_same_weights(undisturbed, weights(tmp_path / "stopped"))


@pytest.mark.parametrize(
    ("start", "epochs"),
    [("from an encoder", 6), pytest.param("from scratch", 3, marks=pytest.mark.slow)],
)
def test_fine_tuning_stops_in_the_middle_of_an_epoch_and_goes_on(
    workplace, tmp_path, start, epochs
):
    """Regression: it could not be continued at all."""
    config = {**train_classification.run_config, "precision": "float32", "dataset_name": "toy"}
    if start == "from an encoder":
        config["checkpoint_path"] = str(workplace / "pretrained/best.pt")
        config["label_count"] = 128
    config |= {"base_path": str(workplace), "output_dir": str(tmp_path / "whole")}
    config["epochs"] = epochs
    config |= {"device": "cpu", "wandb_mode": "disabled", "width": 16, "latent_dim": 8, "depth": 1}
    config |= {"min_valid": 5, "block_size": 4, "batch_size": 16}
    scores = train_classification.main(config)
    stop_at = {7, 40, 41}
    step = loop.training_step

    def interrupted(run, *rest):
        if run.progress.step + 1 in stop_at:
            stop_at.discard(run.progress.step + 1)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    stopped = {**config, "output_dir": str(tmp_path / "stopped")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", interrupted)
        for _ in range(3):
            with pytest.raises(Stopped) as error:
                train_classification.main(stopped)
            assert error.value.status == 143
        assert not stop_at
        assert train_classification.main(stopped) == scores
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "stopped"))
        for state in ("backbone_state", "head_state"):
            assert_same_weights(one[state], other[state])


@pytest.mark.slow
def test_two_processes_stop_in_the_middle_of_an_epoch(workplace, tmp_path, monkeypatch):
    """Regression: they asked each other at the end of an epoch alone, which may take hours."""
    keywords = {"checkpoint_path": str(workplace / "pretrained/best.pt"), "epochs": 1}
    keywords |= {"base_path": str(workplace), "dataset_name": "toy", "batch_size": 2}
    keywords |= {"device": "cpu", "wandb_mode": "disabled", "output_dir": str(tmp_path / "out")}
    config = {**train_classification.run_config, "precision": "float32", **keywords}
    step = loop.training_step  # here one takes as long as on large tiles
    monkeypatch.setattr(loop, "training_step", lambda *a: time.sleep(0.1) or step(*a))
    job = fork_ranks(config, script=train_classification)
    deadline = time.monotonic() + 200
    while not (tmp_path / "out/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    for process in job:
        process.terminate()
    assert [process.wait() for process in job] == [143, 143]
    last = load_checkpoint(tmp_path / "out/last.pt")
    labels = int(last["data"]["training"]["tiles"]["MGRS-0"].split()[0])
    assert 0 < last["step"] < labels // 2, "stopped within the only epoch"
    assert last["step"] % 10 == 0


@pytest.mark.slow
def test_two_processes_fine_tune_the_weights_of_one(workplace, tmp_path):
    """Regression: under torchrun the same job ran in every process, over the same files."""
    keywords = {"checkpoint_path": str(workplace / "pretrained/best.pt"), "epochs": 3}
    keywords |= {"base_path": str(workplace), "dataset_name": "toy", "batch_size": 29}
    keywords |= {"device": "cpu", "wandb_mode": "disabled", "dropout": 0.3, "head": "attention"}
    config = {**train_classification.run_config, "precision": "float32", **keywords}
    config["output_dir"] = str(tmp_path / "one")
    one = train_classification.main(config)
    done = run_ranks({**config, "output_dir": str(tmp_path / "two")}, script=train_classification)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("overall accuracy") == 1, "one report"
    contents = [load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two")]
    for state in ("backbone_state", "head_state"):
        assert_same_weights(*(c[state] for c in contents), atol=1e-5, rtol=1e-5)
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    assert two["confusion_matrix"] == one["confusion_matrix"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_what_is_missing(tmp_path):
    """Regression: torch.save ended in a traceback, or left half a file."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        save_small_checkpoint(disk / "last.pt", step=1)
        with pytest.raises(InputError, match=r"last.pt: could not be written: disk full .*missing"):
            save_small_checkpoint(disk / "last.pt", more=torch.zeros(1 << 20))
        assert load_checkpoint(disk / "last.pt")["step"] == 1
        assert [file.name for file in disk.iterdir()] == ["last.pt"]


def test_a_disk_that_fills_during_training_ends_in_one_line(dataset, tmp_path):
    with small_disk(tmp_path / "disk", 100_000) as disk:
        config = tiny(dataset, disk / "out", epochs=30)
        process = Fork(*as_arguments(config))
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "Traceback" not in err
        assert "disk full" in err.strip().splitlines()[-1]
        assert not list((disk / "out").glob(".*"))


def test_a_log_line_that_was_cut_off_is_written_again(dataset, tmp_path):
    """Regression: a half-written last line of metrics.jsonl made the next start crash."""
    train.main(tiny(dataset, tmp_path / "out", max_steps=4))
    with open(tmp_path / "out/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train.main(tiny(dataset, tmp_path / "out", max_steps=8))
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(9))
    (tmp_path / "log").write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n{"st')
    cut_metrics(tmp_path / "log", 3)
    assert (tmp_path / "log").read_text() == '{"step": 1}\n'


def test_pretraining_leaves_a_fine_tuned_folder_alone(workplace, dataset, tmp_path):
    """Regression: best.pt of a fine-tuned model was overwritten, and its metrics appended to."""
    fine_tune(workplace, tmp_path / "out", epochs=1)
    (tmp_path / "out/last.pt").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="best.pt: found a classifier checkpoint"):
        train.main(tiny(dataset, tmp_path / "out"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_label_efficiency_keeps_what_is_done(workplace, tmp_path, monkeypatch):
    """Regression: it wrote only at the end, and crashed where all labels had one class."""
    monkeypatch.setattr(classifiers, "REPEATS", 1)
    monkeypatch.setattr(classifiers, "FOLDS", 2)
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    keywords |= {"dataset_name": "toy", "output_dir": tmp_path / "out", "seeds": 6}
    keywords |= {"models": "embedding,harmonic"}
    results = run(label_efficiency, label_counts="2", **keywords)
    assert len(results["scores"]) == 12, "two labels are of one class in half of the draws"

    def fit_few(name, x, *rest):
        return classifiers.fit_classifier(name, x, *rest) if len(x) < 60 else 1 / 0

    monkeypatch.setattr(tasks.Classes, "fit", staticmethod(fit_few))
    with pytest.raises(ZeroDivisionError):
        run(label_efficiency, label_counts="20,60", **keywords)
    saved = json.loads((tmp_path / "out/label_efficiency.json").read_text())
    assert {row["label_count"] for row in saved["scores"]} == {20}
    with pytest.raises(InputError, match="wanted label_count=99999"):
        run(label_efficiency, label_counts="20,99999", **keywords)


def test_label_efficiency_holds_so_many_pixels_at_most(workplace, tmp_path, monkeypatch):
    sizes = []
    walk = features.walk
    monkeypatch.setattr(
        features, "walk", lambda dataset: sizes.append(dataset.num_pixels) or walk(dataset)
    )
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    keywords |= {"dataset_name": "toy", "output_dir": tmp_path / "out", "seeds": 1}
    run(label_efficiency, label_counts="0", most_pixels=50, models="harmonic", **keywords)
    assert set(sizes) == {50}


# ---- crashes -------------------------------------------------------------------------------------


def test_the_probe_never_trains_on_one_class():
    """Regression: folds of small layouts left one class in a training part: a crash."""
    rng = random.Random(0)
    found = 0
    for _ in range(1000):
        groups = np.repeat(np.arange(rng.randint(2, 6)), rng.randint(1, 6))
        labels = np.array([rng.choice([1, 2, 2, 2, 3]) for _ in groups])
        blocks = [len(np.unique(groups[labels == code])) for code in np.unique(labels)]
        usable = [count for count in blocks if count > 1]
        if len(usable) < 2:
            continue
        keep = np.isin(labels, np.unique(labels)[[count > 1 for count in blocks]])
        folds = find_folds(labels[keep], groups[keep], min(5, *usable))
        found += bool(folds)
        for train_part, test_part in folds:
            assert len(np.unique(labels[keep][train_part])) > 1
            assert not set(groups[keep][train_part]) & set(groups[keep][test_part])
    assert found > 300


def test_a_layout_of_three_validation_blocks_trains(tmp_path):
    """Regression: cross-validation of this real layout had a training part of one class."""
    make_dataset(tmp_path, tiles=1)
    labels, splits = np.full((16, 16), 40, np.uint8), np.ones((16, 16), np.uint8)
    splits[:4, :12] = tiles.VALIDATION
    labels[:4, 3:6] = 95
    save(tile_of(tmp_path), "labels", labels)
    save(tile_of(tmp_path), "splits", splits)
    assert train.main(tiny(tmp_path, tmp_path / "out", max_steps=2))["step"] == 2


def test_more_workers_than_shards_are_not_started(dataset):
    data = SentinelTimeSeriesDataset(dataset, "toy", process=(0, 40), batch_size=64)
    assert SHARDS // 40 == 1
    assert len(list(iterate_batches(data, num_workers=5))) == data.steps_per_epoch
    with pytest.raises(InputError, match="65 processes: a batch is shared by at most 64"):
        SentinelTimeSeriesDataset(dataset, "toy", process=(0, 65))


def test_batches_of_one_pixel_are_refused(dataset, workplace, tmp_path):
    """Regression: BatchNorm crashed on them, in both trainers."""
    tile = make_tile(tile_of(tmp_path, name="few"), (20, 1, 8, 10), clear=1.0)
    save(tile, "splits", np.array([[1, 1, 1, 2, 2, 3, 3, 3]], np.uint8))
    message = "batch_size=2: cuts 3 training pixels into batches of one"
    with pytest.raises(InputError, match=message):
        train.main(tiny(tmp_path, tmp_path / "out", dataset_name="few", batch_size=2))
    with pytest.raises(InputError, match=message):
        fine_tune(workplace, tmp_path / "o", base_path=tmp_path, dataset_name="few", batch_size=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["config", "backbone", "backbone_state", "bands", "mean", "std"])
def test_a_checkpoint_that_lacks_a_part_is_refused(workplace, tmp_path, key):
    content = torch.load(workplace / "pretrained/best.pt", weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "cut.pt")
    with pytest.raises(InputError, match=f"cut.pt: found no usable {key}"):
        load_checkpoint(tmp_path / "cut.pt")


@pytest.mark.slow
def test_without_a_home_folder_the_cache_is_elsewhere(dataset, tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    code = "import pathlib; pathlib.Path.home = classmethod(lambda cls: 1 / 0); import tiles"
    code = code.replace("1 / 0", "(_ for _ in ()).throw(RuntimeError())")
    code += f"; print(tiles.Tile({str(tile_of(dataset))!r}).clear_counts().sum())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_the_cache_of_clear_counts_stays_small(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "CACHE_FILES", 3)
    for number in range(6):
        tile = Tile(make_tile(tmp_path / f"MGRS-{number}", (4, 4, 4, 2)))
        counts = tile.clear_counts()
    assert len(list((tmp_path / "cache").rglob("*"))) == 1 + 3
    np.testing.assert_array_equal(tile.clear_counts(), counts)


def test_workers_are_counted_by_the_processes_of_a_node(monkeypatch):
    """Regression: eight nodes of four GPUs gave every process one worker or none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    runtime = Runtime(torch.device("cuda"), rank=0, world_size=32)
    assert runtime.workers(-1) == 8


# ---- wandb ---------------------------------------------------------------------------------------


class Broken:
    """Stands in for a wandb run whose service has died."""

    id = "x"

    def log(self, *_, **__):
        raise BrokenPipeError("the service is gone")

    finish = log


@pytest.mark.parametrize("pictures", [{}, {"name": "not there.png"}])
def test_wandb_that_is_lost_in_the_middle_is_said_once(tmp_path, capsys, monkeypatch, pictures):
    log = RunLog(tmp_path / "metrics.jsonl", "x", lambda: (Broken(), ""))
    if pictures:
        monkeypatch.setattr("wandb.Image", Broken().log)  # it copies a picture, to a full disk
        log.images(pictures)
    for step in range(3):
        log.line({"step": step})
    log.finish()
    assert len(lines(tmp_path)) == 3
    assert capsys.readouterr().out.count("wandb: logging failed (the service is gone)") == 1


@pytest.mark.slow
def test_training_goes_on_when_the_wandb_service_is_killed(dataset, tmp_path):
    config = tiny(
        dataset, tmp_path / "out", epochs=24, wandb_mode="offline", wandb_dir=str(tmp_path)
    )
    process = start_and_wait(config, 10, start)
    children = ["pgrep", "-P", str(process.pid), "wandb"]
    service = subprocess.run(children, capture_output=True, text=True, check=True).stdout
    os.kill(int(service), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("wandb: logging failed") == 1
    assert lines(tmp_path / "out")[-1]["step"] == 120


@pytest.mark.slow
def test_training_goes_on_when_the_wandb_folder_is_full(dataset, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with small_disk(out / "wandb", 8192):
        (out / "wandb/filler").write_bytes(b"x" * 4096)
        process = start(
            *as_arguments(tiny(dataset, out, epochs=2, wandb_mode="offline", wandb_dir=str(out)))
        )
        stdout, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert lines(out)[-1]["step"] == 10
    assert stdout.count("wandb: ") <= 1
