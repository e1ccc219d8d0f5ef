"""Files that are never half, and checkpoints that are ours."""

import subprocess

import pytest
import torch
from helpers import save_small_checkpoint

from running.checkpoints import load_checkpoint
from running.errors import InputError
from running.files import atomic_write


def test_atomic_write_leaves_nothing_half(tmp_path):
    target = tmp_path / "file.npy"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoints_of_others_are_refused(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "foreign.pt")
    torch.save({"format": 99, "kind": "pretrained"}, tmp_path / "newer.pt")
    torch.save({"run": subprocess.Popen}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    save_small_checkpoint(tmp_path / "ours.pt", step=1)
    for name, message in {
        "foreign.pt": "of another program",
        "newer.pt": "found format 99, wanted 1",
        "code.pt": "no whole checkpoint",
        "text.pt": "no whole checkpoint",
        "none.pt": "found no file",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    assert load_checkpoint(tmp_path / "ours.pt")["step"] == 1
    with pytest.raises(InputError, match="a pretrained checkpoint, wanted a classifier one"):
        load_checkpoint(tmp_path / "ours.pt", ("classifier",))


@pytest.mark.parametrize("value", ["ten", 2.5, None, -1])
def test_a_checkpoint_with_an_odd_config_is_refused(tmp_path, value):
    """Regression: min_valid="ten" was a traceback hours later, where pixels are chosen."""
    save_small_checkpoint(tmp_path / "odd.pt", config={"min_valid": value})
    with pytest.raises(InputError, match="odd.pt: found no usable config"):
        load_checkpoint(tmp_path / "odd.pt")
