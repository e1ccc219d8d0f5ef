"""Several processes (gloo) train the weights of one, and torchrun starts and stops them."""

import os
import subprocess
import sys

from running.checkpoints import load_checkpoint

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    ROOT,
    as_arguments,
    assert_same_weights,
    lines,
    run_ranks,
    tiny,
    torchrun,
    wait_for_lines,
    weights,
)

from backbones import BACKBONES
from train import main, run_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_two_processes_train_the_weights_of_one(dataset, tmp_path, backbone, workers):
    """With BatchNorm, mix-up and a batch size that two do not divide; gradients of the whole batch.

    Guards against a raw all_reduce inside the graph, statistics of a part of the batch, and loaders
    that give every process the same pixels.
    """
    config = tiny(dataset, tmp_path / "one", backbone=backbone, batch_size=61, max_steps=20)
    # oneDNN sums a convolution's gradient with ten times the rounding of a matrix product
    config |= {"learning_rate": 2e-4} if backbone == "cnn" else {}
    main(config)
    done = run_ranks({**config, "output_dir": str(tmp_path / "two"), "num_workers": workers})
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), atol=1e-5, rtol=1e-5)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("loss", "val_loss", "rankme"):
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-3)


DEFAULTS = {key: run_config[key] for key in ("learning_rate", "blend", "mix_up", "prediction")}


def test_two_processes_have_the_gradients_of_one(dataset, tmp_path, monkeypatch):
    """With the default recipe, of the first step, to rounding: AdamW keeps a tenth of them.

    And without a FutureWarning: the all_reduce of torch.distributed.nn was deprecated.
    """
    monkeypatch.setitem(ENVIRONMENT, "PYTHONWARNINGS", "error::FutureWarning")
    config = tiny(dataset, tmp_path / "one", batch_size=61, max_steps=1, **DEFAULTS)
    main(config)
    done = torchrun({**config, "output_dir": str(tmp_path / "two")})
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    one, two = (
        torch.cat([state["exp_avg"].flatten() for state in moments.values()])
        for moments in (
            load_checkpoint(tmp_path / name / "last.pt")["optimiser_state"]["state"]
            for name in ("one", "two")
        )
    )
    assert one.norm() > 1e-3
    assert (one - two).norm() < 1e-5 * one.norm()


def test_two_processes_score_as_one_does_within_seeds(dataset, tmp_path):
    """With the default recipe rounding grows to other weights, but not to other scores."""
    losses = []
    for seed in range(3):
        config = tiny(dataset, tmp_path / f"{seed}", batch_size=64, max_steps=40, **DEFAULTS)
        losses.append(main(config | {"seed": seed})["val_loss"])
    config = {**config, "seed": 0, "output_dir": str(tmp_path / "two")}
    assert torchrun(config).returncode == 0
    difference = abs(lines(tmp_path / "two")[-1]["val_loss"] - losses[0])
    assert difference < max(losses) - min(losses)


def test_a_run_of_one_process_goes_on_with_two(dataset, tmp_path):
    config = tiny(dataset, tmp_path / "whole", max_steps=12)
    main(config)
    parts = {**config, "output_dir": str(tmp_path / "parts")}
    main({**parts, "max_steps": 6})
    assert run_ranks(parts).returncode == 0
    assert_same_weights(
        weights(tmp_path / "whole"), weights(tmp_path / "parts"), atol=1e-5, rtol=1e-5
    )


def test_all_processes_write_to_the_folder_that_is_named_by_the_time(dataset, tmp_path):
    done = torchrun(tiny(dataset, "", max_steps=2), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert (folder / "last.pt").exists()


TORCHRUN = f'exec {sys.executable} -m torch.distributed.run "$@"'
ONE_PROCESS = f'while [[ $1 == --* ]]; do shift; done; exec {sys.executable} "$@"'


def slurm(folder, config, torchrun=TORCHRUN):
    """Start the batch file of docs where srun and scontrol are stand-ins, the rest is real.

    torchrun: ONE_PROCESS, which imports once, where only the end of the job matters.
    """
    script = (ROOT / "docs/slurm.sh").read_text()
    keys = " ".join(as_arguments(config))
    example = "base_path=/data dataset_name=austria_2022 output_dir=checkpoints/austria"
    assert example in script
    (folder / "job.sh").write_text(script.replace(example, keys))
    stand_ins = {
        "srun": 'exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" >> {folder}/requeued',
        "torchrun": torchrun,
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    names = {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost"}
    names |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": str(os.getpid())}
    environment = ENVIRONMENT | names | {"PATH": f"{folder}:{os.environ['PATH']}"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(["bash", folder / "job.sh"], cwd=ROOT, env=environment, **silent)


def test_the_slurm_example_queues_a_stopped_job_again_and_ends_a_finished_one(dataset, tmp_path):
    """SIGTERM to torchrun, and the same command again: the weights of a run that nobody stopped."""
    whole = tiny(dataset, tmp_path / "whole", epochs=20)
    config = {**whole, "output_dir": str(tmp_path / "run")}
    main(whole)
    with slurm(tmp_path, config) as job:
        wait_for_lines(tmp_path / "run", 3, job)
        job.terminate()
    stopped = lines(tmp_path / "run")[-1]["step"]
    assert 0 < stopped < lines(tmp_path / "whole")[-1]["step"]
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    with slurm(tmp_path, config, ONE_PROCESS) as job:
        assert job.wait(timeout=200) == 0
    assert lines(tmp_path / "run")[-1]["step"] > stopped
    one, other = (weights(tmp_path / name) for name in ("whole", "run"))
    assert_same_weights(one, other, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "requeued").read_text().count("requeue") == 1, "queued again though done"
    with slurm(tmp_path, {**config, "batch_size": 1}, ONE_PROCESS) as job:
        assert job.wait(timeout=100) != 0, "a mistake in the command must end the job"
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
