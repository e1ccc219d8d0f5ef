"""train.py as a user runs it: on tiles, stopped and continued, with mistakes, logged to wandb."""

import json
import signal
import sys
from types import SimpleNamespace

from running.checkpoints import Progress, load_checkpoint
from running.device import start_runtime
from running.errors import InputError
from running.script import run_script

import numpy as np
import pytest
import study
import torch
from helpers import (
    Fork,
    as_arguments,
    assert_same_weights,
    lines,
    make_dataset,
    make_tile,
    read_wandb,
    save_small_checkpoint,
    start,
    tiny,
    wait_for_lines,
    weights,
)
from map_helpers import map_in

import train
import train_classification
import train_regression
from backbones import BACKBONES, TransformerEncoder, load_backbone
from tiles import Tile
from train import main, run_config

# ---- a run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trains_and_leaves_its_files(dataset, tmp_path, backbone):
    out = tmp_path / "out"
    result = main(tiny(dataset, out, backbone=backbone, learning_rate=3e-3, epochs=8))
    logged = lines(out)
    assert [line["step"] for line in logged] == list(range(result["step"] + 1))
    for key in ("loss", "loss_per_dim", "on_diag", "off_diag", "learning_rate", "grad_norm"):
        assert all(np.isfinite(line[key]) for line in logged[1:])
    assert logged[-1]["samples_per_second"] > 0
    untrained, *_, trained = [line for line in logged if "val_loss" in line]
    assert untrained["step"] == 0
    assert trained["val_loss"] < 0.6 * untrained["val_loss"]
    assert 1 <= trained["rankme"] <= 16
    assert 0 < trained["rankme_normalised"] <= 1
    assert 0 <= trained["probe_macro_f1"] <= 1
    names = {"last.pt", "best.pt", "config.json", "metrics.jsonl"}
    names |= {"cross_correlation.png", "false_color.png", "model_card.md"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "config.json").read_text())["backbone"] == backbone


def test_what_comes_after_the_last_step_is_said_as_it_begins(dataset, tmp_path, capsys):
    """Regression: the bar stood still at its end for up to a minute."""
    main(tiny(dataset, tmp_path / "out", max_steps=4, val_interval=2))
    said = capsys.readouterr().out.splitlines()
    first = said.index("validation: loss, RankMe and linear probe")
    assert said[first + 1 : first + 3] == [
        "pictures: cross-correlation and false colour",
        "saving best.pt and last.pt",
    ]
    assert said.count("saving best.pt and last.pt") == 1, "after the last step alone"


def test_checkpoint_holds_all_that_later_scripts_need(dataset, tmp_path):
    """Wrappers (compile, DDP) must not leave prefixes in the keys, and loading must be strict."""
    main(tiny(dataset, tmp_path / "out", max_steps=2))
    content = load_checkpoint(tmp_path / "out/last.pt", ("pretrained",))
    assert content["bands"] == [f"X{i}" for i in range(10)]
    assert content["mean"].shape == content["std"].shape == (10,)
    assert not any("_orig_mod" in k or "module." in k for k in content["backbone_state"])
    backbone = load_backbone(content)
    assert not backbone.training
    x, doys = torch.randn(5, 6, 10), torch.arange(1, 31).view(5, 6) * 12
    ordered, rotation = backbone(x, doys), content.pop("rotation")
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16), atol=1e-5, rtol=0)
    backbone = load_backbone(content)
    assert_same_weights(dict(backbone.state_dict()), content["backbone_state"])
    torch.testing.assert_close(ordered, backbone(x, doys) @ rotation, atol=1e-5, rtol=1e-4)
    content["backbone_state"]["_orig_mod.score.weight"] = content["backbone_state"].pop(
        "score.weight"
    )
    with pytest.raises(InputError, match="score.weight"):
        load_backbone(content)


def test_the_defaults_are_the_recipe_of_the_study():
    """Guards against a default that drifts from the recipe that the published scores are of."""
    recipe = study.RECIPES["from the data"]
    assert {"mix_up", "blend", "prediction", "sample_size", "learning_rate"} < recipe.keys()
    assert {key: run_config[key] for key in recipe} == recipe
    # a network from scratch is the one that the encoder is compared with
    for script in (train_classification, train_regression):
        architecture = set(train.INHERITED) & script.run_config.keys() - {"sample_size"}
        assert architecture >= {"width", "day_cycles"}
        for key in architecture:
            assert script.run_config[key] == run_config[key]


def note_argument(place, seen, function, *arguments):
    """Call a function, and keep one of its arguments."""
    seen.append(arguments[place])
    return function(*arguments)


def test_best_checkpoint_is_the_best_validated(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "plot_correlation", lambda *_: None)  # most of the time
    main(tiny(dataset, tmp_path / "out", val_interval=3))
    best = load_checkpoint(tmp_path / "out/best.pt")
    scores = {line["step"]: line["score"] for line in lines(tmp_path / "out") if "score" in line}
    late = {step: score for step, score in scores.items() if step >= 13}  # two thirds of 20
    assert best["best_score"] == max(late.values()) == late[best["step"]]


def test_an_early_score_that_is_high_by_chance_does_not_choose_the_checkpoint():
    """Regression: an encoder of 500 steps won over those of 4000 on small sets."""
    saved, progress = [], Progress()
    run = SimpleNamespace(progress=progress, config={"val_interval": 10})
    run.save = lambda name: saved.append((name, progress.step))
    for step, score in ((10, 0.9), (20, 0.5), (30, 0.6), (40, 0.55)):
        progress.step = step
        train.keep_best(run, score, total_steps=40)
    assert saved == [("best.pt", 10), ("best.pt", 30)]


def test_without_labels_the_validation_loss_chooses(tmp_path):
    base_path = make_dataset(tmp_path, labels=False)
    result = main(tiny(base_path, tmp_path / "out", epochs=1))
    assert "probe_macro_f1" not in result
    assert result["score"] == -result["val_loss"]


def test_validation_tiles_of_their_own(dataset, tmp_path):
    """A tile that trains must not validate."""
    make_dataset(tmp_path, name="other", tiles=1, clear=0.9)
    result = main(tiny(dataset, tmp_path / "out", val_dataset_name="other", max_steps=1))
    assert result["val_loss"] > 0
    with pytest.raises(InputError, match="is a training tile"):
        main(tiny(dataset, tmp_path / "out2", val_dataset_name="toy"))


# ---- stopped and continued -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "workers"),
    [
        ("transformer", 0),
        pytest.param("cnn", 2, marks=pytest.mark.slow),
        pytest.param("mlp", 0, marks=pytest.mark.slow),
    ],
)
def test_continues_as_if_it_had_never_stopped(dataset, tmp_path, backbone, workers):
    keywords = {"backbone": backbone, "val_interval": 10}
    main(tiny(dataset, tmp_path / "whole", **keywords))
    main(tiny(dataset, tmp_path / "parts", max_steps=5, **keywords))
    main(tiny(dataset, tmp_path / "parts", max_steps=11, num_workers=workers, **keywords))
    main(tiny(dataset, tmp_path / "parts", **keywords))
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert whole["rotation"].equal(parts["rotation"])
    steps = [line["step"] for line in lines(tmp_path / "parts")]
    assert steps == [line["step"] for line in lines(tmp_path / "whole")]


def test_lines_after_the_checkpoint_are_written_again(dataset, tmp_path):
    main(tiny(dataset, tmp_path / "out", max_steps=6))
    with open(tmp_path / "out/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    main(tiny(dataset, tmp_path / "out", max_steps=8))
    assert [line["step"] for line in lines(tmp_path / "out")] == list(range(9))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_loses_nothing(dataset, undisturbed, tmp_path, sent):
    """SIGTERM and Ctrl-C save the step they come in; after a kill the last checkpoint is whole."""
    config = tiny(dataset, tmp_path / "stopped", epochs=30, val_interval=1000)
    process = Fork(*as_arguments(config))
    wait_for_lines(tmp_path / "stopped", 15, process)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if sent != signal.SIGKILL:
        assert process.returncode == 128 + sent, err
        assert "resumes" in out
        assert (
            lines(tmp_path / "stopped")[-1]["step"]
            == load_checkpoint(tmp_path / "stopped/last.pt")["step"]
        )
    main(config)
    assert_same_weights(undisturbed, weights(tmp_path / "stopped"))


def test_refuses_to_go_on_with_another_recipe(dataset, tmp_path):
    main(tiny(dataset, tmp_path / "out", max_steps=2))
    before = (tmp_path / "out/last.pt").read_bytes()
    with pytest.raises(InputError) as error:
        main(tiny(dataset, tmp_path / "out", barlow_lambda=0.5, seed=3))
    assert "barlow_lambda=0.5 (was 0.005), seed=3 (was 0)" in str(error.value)
    assert (tmp_path / "out/last.pt").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(dataset, tmp_path, monkeypatch):
    explodes = 6
    rate = train.learning_rate
    monkeypatch.setattr(
        train,
        "learning_rate",
        lambda peak, step, *rest: 1e30 if step == explodes else rate(peak, step, *rest),
    )
    with pytest.raises(FloatingPointError) as error:
        main(tiny(dataset, tmp_path / "out", log_interval=5))
    message = str(error.value)
    assert message.startswith(f"loss nan at step {explodes + 1}, learning rate 0.00")
    assert "standardised input from -" in message
    last = load_checkpoint(tmp_path / "out/last.pt")
    assert last["step"] == 4
    assert all(value.isfinite().all() for value in weights(tmp_path / "out").values())
    assert lines(tmp_path / "out")[-1]["step"] == 5


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"epochs": 3}, 15),  # 320 training pixels are 5 batches of 64
        ({"epochs": 0, "min_samples": 1000}, 16),  # a small set: more than one pass
        ({"epochs": 0, "min_samples": 10}, 5),  # one pass
        ({"epochs": 0, "min_samples": 10, "max_samples": 100}, 2),  # a large one: less than a pass
        ({"epochs": 0, "min_samples": 1000, "max_steps": 7}, 7),
    ],
)
def test_length_is_passes_or_one_pass_between_two_bounds(dataset, tmp_path, keys, steps):
    config = tiny(dataset, tmp_path / "out", **keys)
    config, (train_set, *_) = train.open_data(config, start_runtime("cpu"))
    assert train.find_length(config, train_set).stop_step == steps


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_read_views_of_many_lengths_in_the_precision_asked_for(
    dataset, tmp_path, monkeypatch, precision
):
    lengths, in_bf16, forward = [], [], TransformerEncoder.forward

    def spy(self, x, doys, *mask):
        if self.training:
            lengths.append(x.shape[1])
            in_bf16.append(torch.is_autocast_enabled("cpu"))
        return forward(self, x, doys, *mask)

    monkeypatch.setattr(TransformerEncoder, "forward", spy)
    main(tiny(dataset, tmp_path / "out", max_steps=20, val_interval=100, precision=precision))
    assert set(lengths) == {4, 5, 6}
    assert set(in_bf16) == {precision == "bfloat16"}


def test_prediction_can_be_left_out(dataset, tmp_path):
    main(tiny(dataset, tmp_path / "pure", max_steps=2, prediction=0.0))
    assert "decoder_state" not in load_checkpoint(tmp_path / "pure/last.pt")
    assert "prediction_error" not in lines(tmp_path / "pure")[-1]
    main(tiny(dataset, tmp_path / "both", max_steps=2))
    assert "decoder_state" in load_checkpoint(tmp_path / "both/last.pt")
    assert lines(tmp_path / "both")[-1]["prediction_error"] > 0


def test_goes_on_from_an_encoder_of_other_tiles(dataset, tmp_path):
    """It must be the encoder that was learned, as it is, fed with values of its own scale."""
    make_dataset(tmp_path, name="other", tiles=1, clear=0.9)
    main(tiny(dataset, tmp_path / "first", dataset_name="other", learning_rate=3e-3, width=32))
    first = load_checkpoint(tmp_path / "first/last.pt")
    keywords = {"checkpoint_path": str(tmp_path / "first/last.pt"), "block_size": 8}
    main(tiny(dataset, tmp_path / "second", learning_rate=1e-30, max_steps=3, **keywords))
    second = load_checkpoint(tmp_path / "second/last.pt")
    assert_same_weights(dict(load_backbone(first).state_dict()), second["backbone_state"])
    assert second["config"]["width"] == second["backbone"]["width"] == 32
    assert second["config"]["block_size"] == 4, "other blocks: its test pixels would be trained on"
    for key in ("mean", "std"):
        assert (second[key] == first[key]).all()
    (tmp_path / "moved.pt").write_bytes((tmp_path / "first/last.pt").read_bytes())
    moved = keywords | {"checkpoint_path": str(tmp_path / "moved.pt")}
    main(tiny(dataset, tmp_path / "second", learning_rate=1e-30, max_steps=4, **moved))
    with pytest.raises(InputError, match="found a run on other data"):
        main(tiny(dataset, tmp_path / "second", learning_rate=1e-30, width=32))
    main(tiny(dataset, tmp_path / "first", dataset_name="other", learning_rate=3e-3, width=32))
    (tmp_path / "first/last.pt").write_bytes((tmp_path / "second/last.pt").read_bytes())
    with pytest.raises(InputError, match="found a run on other data .checkpoint_sha256"):
        main(tiny(dataset, tmp_path / "second", learning_rate=1e-30, **keywords))


def test_an_encoder_of_other_bands_is_no_start(dataset, tmp_path):
    make_dataset(tmp_path, name="six", tiles=1, shape=(20, 16, 16, 6))
    main(tiny(dataset, tmp_path / "ten", max_steps=1))
    keywords = {"checkpoint_path": str(tmp_path / "ten/last.pt"), "dataset_name": "six"}
    with pytest.raises(InputError, match=r"MGRS-0: found no band X6 among X0,.* as .*ten/last.pt"):
        main(tiny(dataset, tmp_path / "out", **keywords))
    assert not (tmp_path / "out").exists()
    save_small_checkpoint(tmp_path / "fine_tuned.pt", "classifier")
    keywords = {"checkpoint_path": str(tmp_path / "fine_tuned.pt")}
    with pytest.raises(InputError, match="found a classifier checkpoint, wanted a pretrained one"):
        main(tiny(dataset, tmp_path / "out", **keywords))
    save_small_checkpoint(tmp_path / "bare.pt", config={"backbone": "transformer"})
    with pytest.raises(InputError, match="bare.pt: found no latent_dim in its config"):
        main(tiny(dataset, tmp_path / "out", checkpoint_path=str(tmp_path / "bare.pt")))


# ---- mistakes ------------------------------------------------------------------------------------


MISTAKES = {
    "learning_rat=1": "error: learning_rat=1: found no such key, did you mean learning_rate?",
    "epochs=many": "error: epochs=many: wanted a whole number (now 0)",
    "min_samples=2000000000": "error: min_samples=2000000000: wanted at most max_samples=1000",
    "learning_rate=fast": "error: learning_rate=fast: wanted a number (now 0.006)",
    "learning_rate=nan": "error: learning_rate=nan: wanted a number (now 0.006)",
    "backbone=resnet": "error: backbone=resnet: wanted one of mlp, cnn, transformer",
    "width=20": "error: width=20: wanted a multiple of 16 for the transformer",
    "batch_size=0": "error: batch_size=0: wanted 2 or more",
    "clip_norm=0": "error: clip_norm=0.0: wanted ",
    "clip_norm=-1": "error: clip_norm=-1.0: wanted ",
    "loss=vicreg": "error: loss=vicreg: wanted one of barlow_twins",
    "augment=flip": "error: augment=flip: wanted one of none, ",
    "device=tpu": "error: device=tpu: wanted one of auto, cpu, cuda",
    "wandb_mode=on": "error: wandb_mode=on: wanted one of auto, online, offline, disabled",
    "dataset_name=nowhere": "processed: found no tile, wanted folders MGRS-*",
    "output_dir=/proc/nothing": "error: output_dir=/proc/nothing: not writable",
    "test_tile_path=/nowhere": "error: test_tile_path=/nowhere: found no such file",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line(dataset, tmp_path, mistake, monkeypatch, capsys):
    config = tiny(dataset, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["train.py", *as_arguments(config), mistake])
    with pytest.raises(SystemExit) as error:
        run_script(main, run_config, train.__doc__)
    message = str(error.value)
    assert MISTAKES[mistake] in message
    assert "\n" not in message


def test_help_prints_the_docstring_and_the_keys(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    run_script(main, run_config, train.__doc__)
    out = capsys.readouterr().out
    assert "torchrun" in out
    assert all(f"  {key}=" in out for key in run_config)


def test_a_picture_tile_of_other_bands(dataset, tmp_path):
    other = make_tile(tmp_path / "MGRS-other", (20, 16, 16, 6))
    with pytest.raises(InputError, match="MGRS-other: found no band X6 among X0,"):
        main(tiny(dataset, tmp_path / "out", test_tile_path=str(other)))


def test_a_checkpoint_that_was_cut_off(dataset, tmp_path):
    main(tiny(dataset, tmp_path / "out", max_steps=2))
    last = tmp_path / "out/last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    with pytest.raises(InputError, match="last.pt: found no whole checkpoint"):
        main(tiny(dataset, tmp_path / "out"))


def test_too_many_observations_wanted_of_real_tiles(shared, tmp_path):
    config = tiny(shared, tmp_path / "out", dataset_name="bouconne_2018", sample_size=16)
    with pytest.raises(InputError, match="min_valid=8 clear.* the clearest pixel has 7"):
        main({**config, "min_valid": 8})
    result = main({**config, "min_valid": 5, "max_steps": 3})
    assert np.isfinite(result["loss"])


# ---- wandb ---------------------------------------------------------------------------------------


def test_wandb_holds_metrics_and_images_with_no_network_and_no_key(dataset, tmp_path, capsys):
    config = tiny(dataset, tmp_path / "out", wandb_mode="auto", epochs=2, val_interval=4)
    config["wandb_dir"] = str(tmp_path / "out")
    main(config)
    assert "logged offline" in capsys.readouterr().out
    history, files = read_wandb(tmp_path / "out")
    keys = set().union(*history)
    wanted = {"loss", "loss_per_dim", "on_diag", "off_diag", "learning_rate", "grad_norm"}
    wanted |= {"samples_per_second", "rankme", "rankme_normalised", "val_loss", "probe_macro_f1"}
    assert wanted | {"cross_correlation", "false_color"} <= keys
    for name in ("cross_correlation", "false_color"):
        steps = [int(row["_step"]) for row in history if name in row]
        assert steps == [4, 8, 10], "pictures are logged at each validation"
    logged = {int(row["step"]): float(row["loss"]) for row in history if "loss" in row}
    assert logged == {row["step"]: row["loss"] for row in lines(tmp_path / "out")[1:]}
    pictures = [file for file in files if file.suffix == ".png"]
    assert {file.name.rsplit("_", 2)[0] for file in pictures} == {
        "cross_correlation",
        "false_color",
    }
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in pictures)


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_does_not_stop_the_run(dataset, tmp_path):
    config = tiny(dataset, tmp_path / "out", wandb_mode="online", max_steps=2)
    config["wandb_dir"] = str(tmp_path / "out")
    environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    environment["WANDB__GRAPHQL_RETRY_MAX"] = "1"  # else it tries again for 30 seconds
    process = start(*as_arguments(config), "wandb_mode=online", **environment)
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    assert "wandb: online logging failed" in out
    assert (tmp_path / "out/false_color.png").exists()


# ---- real tiles ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arkansas_2021", "flanders_2018"])
def test_learns_on_real_tiles(shared, tmp_path, name):
    config = tiny(shared, tmp_path / "out", dataset_name=name, epochs=10, max_steps=40)
    config |= {"sample_size": 12, "min_valid": 10, "learning_rate": 3e-3, "val_interval": 20}
    main(config)
    validated = [line["val_loss"] for line in lines(tmp_path / "out") if "val_loss" in line]
    assert validated[-1] < 0.7 * validated[0]


def test_picture_shows_only_valid_pixels(dataset, tmp_path):
    """Pixels without enough observations must not be drawn as if they had an embedding."""
    tile = make_tile(tmp_path / "MGRS-holes", clear=0.9)
    masks = np.load(tile / "masks.npy")
    masks[:, :8, :8] = 0
    np.save(tile / "masks.npy", masks)
    main(tiny(dataset, tmp_path / "out", test_tile_path=str(tile), max_steps=2))
    shown = (map_in(tmp_path / "out/false_color.png", (16, 16)) < 255).any(-1)
    assert (shown == (Tile(tile).clear_counts() >= 5)).all()
