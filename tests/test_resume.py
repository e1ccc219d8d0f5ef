"""What a run that is resumed, starts over or shares a folder may not lose or mix up."""

import os
import shutil
import signal

from running.checkpoints import load_checkpoint
from running.errors import InputError, Stopped, notice
from running.files import lock_folder

import numpy as np
import pytest
import torch
from helpers import (
    GEOREFERENCE,
    Fork,
    assert_same_weights,
    fine_tune,
    in_child,
    lines,
    make_dataset,
    make_tile,
    run_ranks,
    save,
    tile_of,
    tiny,
    weights,
)

import train
from tiles import Tile


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- overwrite -----------------------------------------------------------------------------------


def test_overwrite_never_removes_an_encoder(workplace, tmp_path):
    """Regression: the encoder that it should read was deleted, and nothing was written."""
    train.main(tiny(workplace, tmp_path / "pre", max_steps=2))
    before = files(tmp_path / "pre")
    with pytest.raises(InputError, match="found a pretrained checkpoint, wanted another"):
        fine_tune(
            workplace,
            tmp_path / "pre",
            checkpoint_path=tmp_path / "pre/best.pt",
            overwrite=True,
            epochs=1,
        )
    assert files(tmp_path / "pre") == before


def test_overwrite_removes_nothing_for_a_config_that_is_refused(workplace, tmp_path):
    fine_tune(workplace, tmp_path / "out", epochs=1)
    before = files(tmp_path / "out")
    with pytest.raises(InputError, match="sample_size=0: wanted 1 to"):
        fine_tune(
            workplace,
            tmp_path / "out",
            checkpoint_path="",
            backbone="mlp",
            min_valid=5,
            block_size=4,
            sample_size=0,
            overwrite=True,
        )
    assert files(tmp_path / "out") == before


def test_overwrite_continues_its_own_run_and_replaces_another(workplace, tmp_path):
    """Regression: overwrite=true deleted its own work when a queue started it again."""
    keywords = {"epochs": 4, "overwrite": True}
    fine_tune(workplace, tmp_path / "out", **keywords)
    first = lines(tmp_path / "out")
    stamp = (tmp_path / "out/last.pt").stat().st_mtime_ns
    fine_tune(workplace, tmp_path / "out", **keywords)
    assert (tmp_path / "out/last.pt").stat().st_mtime_ns == stamp, "trained again"
    assert lines(tmp_path / "out") == first
    fine_tune(workplace, tmp_path / "out", **keywords | {"epochs": 2})
    assert load_checkpoint(tmp_path / "out/last.pt")["config"]["epochs"] == 2


def test_overwrite_never_removes_the_classifier_that_it_starts_from(workplace, tmp_path):
    fine_tune(workplace, tmp_path / "out", epochs=1)
    before = files(tmp_path / "out")
    keywords = {"checkpoint_path": tmp_path / "out/best.pt", "overwrite": True, "label_count": 40}
    with pytest.raises(InputError, match="out: holds checkpoint_path, .*another output_dir"):
        fine_tune(workplace, tmp_path / "out", **keywords)
    assert files(tmp_path / "out") == before


# ---- other data ----------------------------------------------------------------------------------


def relabel(dataset, function):
    for number in range(2):
        tile = tile_of(dataset, number)
        save(tile, "labels", function(np.load(tile / "labels.npy")))


def swap(labels):
    return np.where(labels == 40, 95, 40).astype(np.uint8)


@pytest.mark.parametrize("change", ["swapped", "renamed", "splits"])
def test_fine_tuning_refuses_changed_labels_and_splits(workplace, tmp_path, change):
    """Regression: it resumed with classes that meant something else, or on test pixels."""
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    keywords = {"base_path": base_path, "epochs": 1}
    fine_tune(workplace, tmp_path / "out", **keywords)
    if change == "swapped":
        relabel(base_path, swap)
    elif change == "renamed":
        relabel(base_path, lambda labels: np.where(labels == 95, 10, labels).astype(np.uint8))
    else:
        split = Tile(tile_of(base_path)).split_map(4)
        save(tile_of(base_path), "splits", np.roll(split, 8, 0))
    with pytest.raises(InputError, match="found a run on other data"):
        fine_tune(workplace, tmp_path / "out", **keywords)


def test_pretraining_refuses_labels_that_come_or_go(dataset, tmp_path):
    """Regression: scores of the probe and minus the loss were compared with each other."""
    train.main(tiny(dataset, tmp_path / "out", max_steps=8))
    for number in range(2):
        (tile_of(dataset, number) / "labels.npy").unlink()
        save(tile_of(dataset, number), "splits", Tile(tile_of(dataset, number)).split_map(4))
    with pytest.raises(InputError, match="found a run on other data"):
        train.main(tiny(dataset, tmp_path / "out"))


def test_clear_counts_notice_another_file_of_the_same_size_and_time(dataset):
    tile = tile_of(dataset)
    Tile(tile).clear_counts()
    stat = (tile / "masks.npy").stat()
    masks = np.zeros((20, 16, 16), np.uint8)
    masks[:7] = 1
    save(tile, "masks", masks)
    os.utime(tile / "masks.npy", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (Tile(tile).clear_counts() == 7).all()


# ---- one run a folder, several starts ------------------------------------------------------------


@pytest.mark.parametrize("change", ["doys", "band_mean", "masks"])
def test_a_run_never_goes_on_with_another_year_of_the_same_pixels(workplace, tmp_path, change):
    """Regression: bands, days and masks of two years passed for the same."""
    base_path = make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8)
    keywords = {"base_path": base_path, "epochs": 1}
    fine_tune(workplace, tmp_path / "out", **keywords)
    tile = tile_of(base_path)
    numbers = np.load(tile / f"{change}.npy")
    if change == "masks":  # one more observation, of a pixel that takes part anyway
        row, column = np.argwhere(numbers.sum(0) == np.sort(numbers.sum(0), None)[-20])[0]
        numbers[:, row, column] = 1
    else:
        numbers[-1] += 1
    save(tile, change, numbers)
    with pytest.raises(InputError, match="found a run on other data"):
        fine_tune(workplace, tmp_path / "out", **keywords)


def test_two_trainings_in_one_folder_are_refused(dataset, tmp_path, monkeypatch):
    """Regression: both ended with success, and with their files mixed."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("time.monotonic", iter(range(0, 10_000, 5)).__next__)
    with lock_folder(tmp_path / "out"):
        with pytest.raises(InputError, match="found another run that writes there"):
            train.main(tiny(dataset, tmp_path / "out", max_steps=1))
        assert not list((tmp_path / "out").iterdir())


def test_a_limit_of_steps_does_not_change_which_checkpoint_is_best(
    dataset, tmp_path, monkeypatch, capsys
):
    """Regression: the validation that ends a limited run could win best.pt."""
    monkeypatch.setattr(train, "plot_correlation", lambda *_: None)  # most of the time
    config = tiny(dataset, tmp_path / "whole", epochs=6, val_interval=8)
    train.main(config)
    parts = {**config, "output_dir": str(tmp_path / "parts")}
    for limit in (3, 11, 13, 0):
        train.main({**parts, "max_steps": limit})
        assert (tmp_path / "parts/best.pt").exists()
    for name in ("last.pt", "best.pt"):
        assert_same_weights(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    best = [load_checkpoint(tmp_path / run / "best.pt")["step"] for run in ("whole", "parts")]
    assert best[0] == best[1]
    total = load_checkpoint(tmp_path / "parts/last.pt")["step"]
    capsys.readouterr()
    train.main({**parts, "max_steps": 3})  # nothing is left to do
    assert f"steps {total} to {total} of {total}" in capsys.readouterr().out


def test_a_damaged_best_does_not_keep_a_run_from_going_on(dataset, tmp_path):
    """All that it needs is in last.pt."""
    train.main(tiny(dataset, tmp_path, max_steps=9))
    (tmp_path / "best.pt").write_bytes(b"cut off")
    train.main(tiny(dataset, tmp_path))
    assert load_checkpoint(tmp_path / "best.pt")["step"] > 9


def test_a_run_of_before_prediction_is_refused_in_one_line(dataset, tmp_path):
    config = tiny(dataset, tmp_path / "out", max_steps=2)
    train.main(config)
    path = tmp_path / "out/last.pt"
    content = torch.load(path, weights_only=True)
    del content["decoder_state"], content["config"]["prediction"]
    torch.save(content, path)
    with pytest.raises(InputError, match="found no decoder in it"):
        train.main({**config, "max_steps": 4})


def test_a_run_that_stopped_between_validations_cannot_end_there(dataset, tmp_path):
    """Regression: it ended in KeyError: 'score', since no checkpoint is best."""
    config = tiny(dataset, tmp_path / "out", val_interval=100, checkpoint_interval=2)
    with pytest.MonkeyPatch.context() as patch:
        step = train.train_step

        def interrupted(*arguments):
            if arguments[6] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)

        patch.setattr(train, "train_step", interrupted)
        with pytest.raises(Stopped):
            train.main(config)
    with pytest.raises(InputError, match="max_steps=4: found a run that stopped at step 4 betw"):
        train.main({**config, "max_steps": 4})
    assert train.main({**config, "max_steps": 5})["step"] == 5
    assert (tmp_path / "out/best.pt").exists()


def test_signals_end_a_script_again_when_its_training_is_done(dataset, tmp_path):
    """Regression: the test split of a large tile was scored to its end whatever the user did."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train.main(tiny(dataset, tmp_path / "out", max_steps=2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_goes_on_in_another_precision_says_so(dataset, tmp_path, capsys):
    config = tiny(dataset, tmp_path / "out", max_steps=2)
    train.main(config)
    path = tmp_path / "out/last.pt"
    content = torch.load(path, weights_only=True)
    assert not content["in_bf16"]
    torch.save(content | {"in_bf16": True}, path)
    train.main({**config, "max_steps": 4})
    assert "out: begun in bfloat16, resumes in float32" in capsys.readouterr().out


def test_a_run_of_before_blending_is_not_blended_from_the_middle_on(dataset, tmp_path):
    """Regression: a key that the checkpoint lacked stood for today's default."""
    config = tiny(dataset, tmp_path / "out", max_steps=2, blend=0.0)
    train.main(config)
    path = tmp_path / "out/last.pt"
    content = torch.load(path, weights_only=True)
    del content["config"]["blend"]
    torch.save(content, path)
    with pytest.raises(InputError, match=r"blend=0.5 \(was 0.0\)"):
        train.main({**config, "max_steps": 4, "blend": 0.5})
    assert train.main({**config, "max_steps": 4})["step"] == 4


@pytest.mark.slow
def test_two_processes_simulate_their_tiles_and_train_small_batches(tmp_path):
    """Regression: the first start under torchrun failed, and batches without a pixel did."""
    config = {**train.run_config, "base_path": str(tmp_path), "output_dir": str(tmp_path / "out")}
    config |= {"max_steps": 2, "batch_size": 16, "width": 16, "depth": 1, "latent_dim": 8}
    config |= {"projector_dim": 16, "val_pixels": 16, "device": "cpu", "wandb_mode": "disabled"}
    done = run_ranks({**config, "log_interval": 1})
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(tmp_path / "out")] == [0, 1, 2]


def test_a_run_that_diverges_ends_in_one_line_at_its_validation(dataset, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite"):
        train.main(tiny(dataset, tmp_path / "out", learning_rate=1e30, val_interval=1))
    assert not (tmp_path / "out/best.pt").exists()


def test_a_link_that_leads_to_itself_is_a_bad_tile(dataset, tmp_path):
    loop = tile_of(dataset, 9)
    loop.symlink_to(loop.name)
    with pytest.raises(InputError, match="MGRS-9/bands.npy: found no"):
        train.main(tiny(dataset, tmp_path / "out", max_steps=1))
    assert train.main(tiny(dataset, tmp_path / "o", max_steps=1, skip_bad_tiles=True))["step"] == 1


# ---- the same ground -----------------------------------------------------------------------------


def tile_at(folder, name, first, count, size=1e-4, offset=0.0, crs="EPSG:4326"):
    transform = [size, 0, size * (first + offset), 0, -size, size * (5000 + offset)]
    shape = (2, count, count, 1)
    return Tile(make_tile(folder / name, shape, bands=["B04"], crs=crs, transform=transform))


@pytest.mark.parametrize("block_size", [8, 16, 20, 100])
@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3])
def test_windows_of_one_grid_have_the_splits_of_the_whole(tmp_path, block_size, offset):
    """Regression: tiles smaller than a block, and centres on edges, had splits of their own."""
    for origin in (0, 123_457):
        whole = tile_at(tmp_path, f"MGRS-{origin}", origin, 64, offset=offset).split_map(block_size)
        for first, count in ((3, 10), (17, 30), (40, 15)):
            name = f"MGRS-{origin}-{first}"
            part = tile_at(tmp_path, name, origin + first, count, offset=offset)
            expected = whole[:count, first : first + count]
            assert (part.split_map(block_size) == expected).all()


def test_fork_helpers_report_failures():
    """A forked process that fails must not count as one that ended well."""
    assert in_child(lambda: None) == 0
    assert in_child(lambda: 1 / 0) == 1
    process = Fork("seed=-1")
    assert process.communicate() == ["", "error: seed=-1: wanted 0 to 2147483647"]
    assert process.returncode == 1
    assert run_ranks({**train.run_config, "seed": -1}).returncode == 1


@pytest.mark.parametrize("step", [6, 20])  # in mid-run, and when the run has ended
def test_a_lost_best_is_said_and_chosen_anew(dataset, tmp_path, step, capsys):
    """Regression: last.pt copied alone ended well and named a best.pt that was not there."""
    keys = {"max_steps": 20, "val_interval": 4, "checkpoint_interval": 2}
    train.main(tiny(dataset, tmp_path / "one", **keys | {"max_steps": step}))
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one/last.pt", tmp_path / "two/last.pt")
    capsys.readouterr()
    notice.cache_clear()
    train.main(tiny(dataset, tmp_path / "two", **keys))
    assert "two/best.pt: found no whole checkpoint" in capsys.readouterr().out
    best = load_checkpoint(tmp_path / "two/best.pt")
    assert best["step"] > step or best["step"] == step == 20


def test_bands_that_are_replaced_during_a_training_end_it(dataset, tmp_path, monkeypatch):
    """Regression: half of the steps were of one file, half of another, and nobody said so."""
    step_of, bands = train.train_step, tile_of(dataset) / "bands.npy"

    def replacing(*arguments):
        if arguments[6] == 4:
            shutil.copy(bands, tmp_path / "new.npy")
            (tmp_path / "new.npy").replace(bands)
        return step_of(*arguments)

    monkeypatch.setattr(train, "train_step", replacing)
    with pytest.raises(InputError, match="bands.npy: found that it changed while it was read"):
        train.main(tiny(dataset, tmp_path / "out", max_steps=8, checkpoint_interval=4))
    assert load_checkpoint(tmp_path / "out/last.pt")["step"] == 4, "what was safe stays"


def test_bands_that_were_corrected_in_place_are_other_data(dataset, tmp_path):
    """Regression: with the statistics of before, a resumed run took them for the same."""
    train.main(tiny(dataset, tmp_path / "out", max_steps=4))
    bands = np.load(tile_of(dataset) / "bands.npy", mmap_mode="r+")
    bands[bands > 1000] -= 1000
    bands.flush()
    with pytest.raises(InputError, match="found a run on other data .observations"):
        train.main(tiny(dataset, tmp_path / "out", max_steps=8))
