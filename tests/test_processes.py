"""Several processes under torchrun (gloo) train the weights of one."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import as_arguments, assert_same_weights, lines, tiny, weights

from backbones import BACKBONES
from train import main


def torchrun(config, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", str(ROOT / "train.py"), *as_arguments(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
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
