"""Several processes under torchrun (gloo) train the weights of one."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_train import as_arguments, assert_same_weights, lines, tiny, weights

from backbones import BACKBONES
from train import main

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun_command(config, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc-per-node={processes}", ROOT / "train.py", *as_arguments(config)]


def torchrun(config, processes=2, cwd=ROOT):
    return subprocess.run(
        torchrun_command(config, processes),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("backbone", "workers"), list(zip(BACKBONES, (0, 2, 2), strict=True)))
def test_two_processes_train_the_weights_of_one(dataset, tmp_path, backbone, workers):
    """With BatchNorm, mix-up and a batch size that two do not divide; gradients of the whole batch.

    Guards against a raw all_reduce inside the graph, statistics of a part of the batch, and loaders
    that give every process the same pixels.
    """
    config = tiny(dataset, tmp_path / "one", backbone=backbone, batch_size=61, max_steps=20)
    main(config)
    done = torchrun({**config, "output_dir": str(tmp_path / "two"), "num_workers": workers})
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-5, rtol=1e-5)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("loss", "val_loss", "rankme"):
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-3)


def test_a_run_of_one_process_goes_on_with_two(dataset, tmp_path):
    config = tiny(dataset, tmp_path / "whole", max_steps=12)
    main(config)
    parts = {**config, "output_dir": str(tmp_path / "parts")}
    main({**parts, "max_steps": 6})
    assert torchrun(parts).returncode == 0
    assert_same_weights(
        weights(tmp_path / "whole"), weights(tmp_path / "parts"), atol=1e-5, rtol=1e-5
    )


def test_processes_agree_on_the_folder_that_the_time_names(dataset, tmp_path):
    done = torchrun(tiny(dataset, "", max_steps=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert (folder / "last.pt").exists()


def test_a_job_that_its_queue_stops_goes_on_where_it_was(dataset, tmp_path):
    """What Slurm does: SIGTERM to torchrun, and the same command once more."""
    whole = tiny(dataset, tmp_path / "whole", epochs=30)
    config = {**whole, "output_dir": str(tmp_path / "stopped")}
    main(whole)
    with subprocess.Popen(
        torchrun_command(config),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as job:
        metrics = tmp_path / "stopped" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            assert job.poll() is None, job.stderr.read().decode()
            time.sleep(0.01)
        job.terminate()
    stopped = lines(tmp_path / "stopped")[-1]["step"]
    assert 0 < stopped < lines(tmp_path / "whole")[-1]["step"]
    assert torchrun(config).returncode == 0
    assert_same_weights(
        weights(tmp_path / "whole"), weights(tmp_path / "stopped"), atol=1e-4, rtol=1e-4
    )
