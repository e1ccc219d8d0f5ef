"""running/log.py: a run continues with metrics.jsonl, whatever is wrong with wandb."""

import sys

from running.device import Runtime
from running.log import start_log

import pytest
import torch
from helpers import lines

HERE = Runtime(torch.device("cpu"), 0, 1)
ODD = {
    "WANDB_CONSOLE": "x",
    "WANDB_MODE": "garbage",
    "WANDB_INIT_TIMEOUT": "abc",
    "WANDB_BASE_URL": "::",
    "WANDB_RUN_ID": "a/b",
}


@pytest.mark.parametrize("mode", ["auto", "offline"])
@pytest.mark.parametrize("name", ODD)
def test_a_malformed_variable_of_wandb_is_said_once(tmp_path, monkeypatch, capsys, name, mode):
    import wandb

    wandb.teardown()  # forgets what it has read from the environment
    monkeypatch.setenv(name, ODD[name])
    log = start_log({"wandb_mode": mode}, "train", tmp_path, HERE)
    log.line({"step": 1})
    log.finish()
    wandb.teardown()
    out = capsys.readouterr().out
    assert out.count("\n") <= 2
    assert out.count("wandb: logging failed") <= 1
    assert lines(tmp_path) == [{"step": 1}]


def test_wandb_that_cannot_be_imported_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = start_log({"wandb_mode": "offline"}, "train", tmp_path, HERE)
    log.line({"step": 1})
    assert capsys.readouterr().out.count("wandb: logging failed (import of wandb halted") == 1
    assert lines(tmp_path) == [{"step": 1}]
