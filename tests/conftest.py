"""Fixtures, and quiet, private surroundings for all tests."""

import os
import tempfile

import running  # noqa: F401  # before torch

import pytest
import torch

# before any test imports the project: a private cache, and no wandb account
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="test-cache-")
os.environ["NETRC"] = os.devnull
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)

pytest.register_assert_rewrite("helpers", "browser")
import helpers  # noqa: E402

import train  # noqa: E402


@pytest.fixture
def dataset(tmp_path):
    """A folder with the data set "toy" of two labelled tiles."""
    return helpers.make_dataset(tmp_path)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Labelled, georeferenced tiles, a pretrained and a fine-tuned checkpoint.

    Every test of a worker sees the same folder: read it, and write somewhere else.
    """
    path = tmp_path_factory.mktemp("workplace")
    helpers.make_dataset(path, shape=(20, 24, 16, 10), clear=0.8, **helpers.GEOREFERENCE)
    train.main(helpers.tiny(path, path / "pretrained", max_steps=8))
    helpers.fine_tune(path, path / "classifier", epochs=4)
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Weights after the 30 epochs on the fixture `dataset` of a run that nothing has stopped."""
    path = tmp_path_factory.mktemp("undisturbed")
    torch.set_num_threads(1)
    train.main(helpers.tiny(helpers.make_dataset(path), path / "out", epochs=30, val_interval=1000))
    return helpers.weights(path / "out")


@pytest.fixture
def shared():
    """The real tiles, where they are."""
    if not helpers.SHARED.exists():
        pytest.skip("the real tiles of ../shared are not here")
    return helpers.SHARED


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    """Small batches, other processes may be at work; and a test has the same numbers each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
