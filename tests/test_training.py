"""What both trainers share: the schedule, and what a resumed run reads."""

import json
from collections import OrderedDict

from running.checkpoints import Run, cut_metrics, read_last
from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import lines, save_small_checkpoint

from train import run_config
from utils import learning_rate


@pytest.mark.parametrize("total", [1, 5, 40, 1000, 20_000])
def test_learning_rate_warms_up_holds_and_decays(total):
    """Guards against a rate that drops to nothing mid-run, a skipped warm-up and a second one."""
    top, warmup = run_config["learning_rate"], min(run_config["warmup_steps"], -(-total // 10))
    hold = run_config["hold_fraction"]
    rates = np.array([learning_rate(top, step, total, warmup, hold) for step in range(total)])
    assert (rates > 0).all()
    assert rates.max() == pytest.approx(top, rel=0.02 if total > 5 else 0.6)
    peak = int(rates.argmax())
    assert (np.diff(rates[: peak + 1]) >= 0).all()
    assert (np.diff(rates[peak:]) <= 1e-12).all(), "rises again"
    if total >= 40:
        assert rates[0] < 0.5 * top, "no warm-up"
        assert peak <= total / 9
        assert rates[total // 2] > 0.5 * top, "dropped mid-run"
        assert rates[-1] < 0.05 * top


DEFAULTS = {"width": 16, "added_later": 0.5, "device": "auto"}


def read(folder, data=None, **changed):
    data = data or {"training": ["MGRS-0"]}
    return read_last(folder, "pretrained", DEFAULTS | changed, data, DEFAULTS, {"device"})


def test_a_run_goes_on_only_with_the_config_that_it_began_with(tmp_path):
    assert read(tmp_path) is None
    before = {"width": 16, "device": "cpu"}
    save_small_checkpoint(tmp_path / "last.pt", config=before, step=3)
    assert read(tmp_path)["step"] == 3, "a key that the checkpoint does not have is its default"
    assert read(tmp_path, device="cuda")["step"] == 3
    with pytest.raises(InputError, match=r"last.pt: .*width=32 \(was 16\).* another output_dir"):
        read(tmp_path, width=32)
    with pytest.raises(InputError, match=r"added_later=1.0 \(was 0.5\)"):
        read(tmp_path, added_later=1.0)
    save_small_checkpoint(tmp_path / "last.pt", "classifier", config=DEFAULTS)
    with pytest.raises(InputError, match="a classifier checkpoint, wanted a pretrained one"):
        read(tmp_path)


def test_a_run_goes_on_only_on_the_data_that_it_began_with(tmp_path):
    data = {"training": ["MGRS-0"]}
    save_small_checkpoint(tmp_path / "last.pt", config=DEFAULTS, data=data, step=3)
    assert read(tmp_path, data)["step"] == 3
    with pytest.raises(InputError, match=r"last.pt: .*other data .*MGRS-0.*MGRS-1"):
        read(tmp_path, {"training": ["MGRS-0", "MGRS-1"]})


def test_the_best_checkpoint_of_another_run_is_not_overwritten(tmp_path):
    save_small_checkpoint(tmp_path / "best.pt", config=DEFAULTS | {"width": 32})
    with pytest.raises(InputError, match=r"best.pt: .*width=16 \(was 32\)"):
        read(tmp_path)


def test_resume_puts_weights_optimiser_and_progress_back(tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(OrderedDict(head=torch.nn.Linear(3, 2)))
        optimiser = torch.optim.AdamW(model.parameters(), 0.1)
        return Run("classifier", {}, None, tmp_path, model, optimiser, {})

    save_small_checkpoint(tmp_path / "best.pt", "classifier")
    before, run = build(0), build(1)
    before.model(torch.ones(4, 3)).sum().backward()
    before.optimiser.step()
    last = {"head_state": before.model.head.state_dict()}
    last["optimiser_state"] = before.optimiser.state_dict()
    last |= {"step": 5, "best_score": 0.25, "line": {"step": 5, "loss": 1.5}, "bands": ["B02"]}
    run.restore(last)
    progress = run.progress
    assert (progress.step, progress.best_score, progress.best_step) == (5, 0.25, 0)
    assert progress.line == {"step": 5, "loss": 1.5}
    assert run.model.head.weight.equal(before.model.head.weight)
    moments = [r.optimiser.state_dict()["state"][0]["exp_avg"] for r in (before, run)]
    assert moments[0].equal(moments[1])


def test_lines_of_metrics_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 2)
    assert not path.exists()
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    cut_metrics(path, 2)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    cut_metrics(path, -1)
    assert lines(tmp_path) == []
