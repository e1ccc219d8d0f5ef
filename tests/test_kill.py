"""SIGKILL at random moments of an unfinished run and the same command again, 20 times.

The result is that of a run that nothing disturbed: weights bit for bit, each logged step once and
in order, no temporary file left. test_map_faults.py does the same to mapping.
"""

import statistics
import time

from running.checkpoints import load_checkpoint
from running.log import RunLog

import pytest
from helpers import assert_same_weights, kill_again_and_again, lines, tiny, weights

import train
import train_classification

pytestmark = pytest.mark.slow
A_LINE = (RunLog, "line")  # kills are counted from lines of metrics.jsonl


def assert_no_temporary_files(folder):
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_that_is_killed_again_and_again(dataset, tmp_path, workers):
    """20 kills come within 15 * (4 + 2) + 5 * 2 of its 105 steps, so that none comes too late."""
    config = tiny(dataset, tmp_path / "whole", epochs=21, checkpoint_interval=3, val_interval=26)
    last_step = train.main(config)["step"]
    rates = [line["samples_per_second"] for line in lines(tmp_path / "whole")[1:]]
    tempo = config["batch_size"] / statistics.median(rates)  # without validations
    killed = {**config, "output_dir": str(tmp_path / "killed"), "num_workers": workers}
    checkpoint = tmp_path / "killed/last.pt"

    def is_done():
        return checkpoint.exists() and load_checkpoint(checkpoint)["step"] == last_step

    kill_again_and_again(lambda: train.main(killed), A_LINE, 4, tempo, is_done, seed=workers)
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    timing = "samples_per_second"
    whole, again = (
        [{k: v for k, v in line.items() if k != timing} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert again == whole
    assert_no_temporary_files(tmp_path / "killed")


def test_fine_tuning_that_is_killed_again_and_again(workplace, tmp_path):
    """20 kills come within 15 * (1 + 2) + 5 * 2 of its 60 epochs."""
    config = {**train_classification.run_config, "dataset_name": "toy", "epochs": 60}
    config |= {"checkpoint_path": str(workplace / "pretrained/best.pt"), "label_count": 128}
    config |= {"base_path": str(workplace), "device": "cpu", "wandb_mode": "disabled"}
    whole, killed = ({**config, "output_dir": str(tmp_path / name)} for name in ("whole", "killed"))
    begin = time.monotonic()
    train_classification.main(whole)
    tempo = (time.monotonic() - begin) / config["epochs"]

    def is_done():
        return (tmp_path / "killed/metrics.json").exists()

    kill_again_and_again(lambda: train_classification.main(killed), A_LINE, 1, tempo, is_done)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(tmp_path / run / name) for run in ("whole", "killed"))
        for state in ("backbone_state", "head_state"):
            assert_same_weights(one[state], other[state])
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    reports = [(tmp_path / name / "metrics.json").read_bytes() for name in ("whole", "killed")]
    assert reports[0] == reports[1]
    assert_no_temporary_files(tmp_path / "killed")
