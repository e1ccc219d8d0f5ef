"""SIGKILL at random moments and the same command again, at least 20 times until it is done.

The result is that of a run that nothing disturbed: weights bit for bit, each logged step once and
in order, no temporary file left. The number of kills is printed (pytest -s). test_map_faults.py
does the same to mapping.
"""

import random

import pytest
from helpers import (
    assert_same_weights,
    in_child,
    lines,
    tiny,
    weights,
)

import train
import train_classification
from files import load_checkpoint

KILLS = 20


def kill_until_done(function, longest, seed):
    """Start a function and kill it at random moments, then let it end; returns how often."""
    rng, kills = random.Random(seed), 0
    while kills < KILLS:
        kills += in_child(function, kill_after=rng.uniform(0.02, longest)) == -9
    assert in_child(function) == 0
    print(f"\n{kills} kills")
    return kills


def assert_no_temporary_files(folder):
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_that_is_killed_again_and_again(dataset, tmp_path, workers):
    config = tiny(dataset, tmp_path / "whole", epochs=20, checkpoint_interval=3, val_interval=7)
    train.main(config)
    killed = {**config, "output_dir": str(tmp_path / "killed"), "num_workers": workers}
    assert kill_until_done(lambda: train.main(killed), 1.0, workers) >= KILLS
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert_same_weights(
        weights(tmp_path / "whole", "best.pt"), weights(tmp_path / "killed", "best.pt")
    )
    timing = "samples_per_second"
    whole, again = (
        [{k: v for k, v in line.items() if k != timing} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert again == whole
    assert_no_temporary_files(tmp_path / "killed")


def test_fine_tuning_that_is_killed_again_and_again(workplace, tmp_path):
    config = {**train_classification.run_config, "dataset_name": "toy", "epochs": 12, "patience": 0}
    config |= {"checkpoint_path": str(workplace / "pretrained/best.pt"), "batch_size": 16}
    config |= {"base_path": str(workplace), "device": "cpu", "wandb_mode": "disabled"}
    whole, killed = ({**config, "output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    train_classification.main(whole)
    kill_until_done(lambda: train_classification.main(killed), 0.8, 0)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
        for state in ("backbone_state", "head_state"):
            assert_same_weights(one[state], other[state])
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    reports = [(tmp_path / name / "metrics.json").read_bytes() for name in ("whole", "killed")]
    assert reports[0] == reports[1]
    assert_no_temporary_files(tmp_path / "killed")
