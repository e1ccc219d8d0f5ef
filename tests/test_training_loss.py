"""What a step of train.py learns from: mixed and blended views, losses, augmentations."""

import numpy as np
import pytest
import torch
from helpers import (
    lines,
    tiny,
    weights,
)

import barlow_twins
import train
import transforms
from barlow_twins import LOSSES
from train import main, run_config


def test_mix_up_takes_part_where_it_is_asked_for(dataset, tmp_path):
    for weight in (0.0, 1.0):
        main(tiny(dataset, tmp_path / f"{weight}", mix_up=weight, max_steps=3))
        assert ("mix_up_loss" in lines(tmp_path / f"{weight}")[-1]) == (weight > 0)
    first, mixed = (lines(tmp_path / name)[1] for name in ("0.0", "1.0"))
    assert mixed["loss"] == pytest.approx(first["loss"] + 0.005 * mixed["mix_up_loss"], rel=1e-3)
    one, other = (weights(tmp_path / name) for name in ("0.0", "1.0"))
    assert not all(value.equal(other[key]) for key, value in one.items())


def test_mix_up_in_every_third_step_has_three_times_the_weight(dataset, tmp_path):
    for every in (1, 3):
        keys = {"mix_up_every": every, "max_steps": 5, "log_interval": 1}
        main(tiny(dataset, tmp_path / f"{every}", **keys))
    one, third = (lines(tmp_path / name)[1:] for name in ("1", "3"))
    assert ["mix_up_loss" in line for line in third] == [True, False, False, True, False]
    first, again = one[0], third[0]  # before the weights differ
    assert first["mix_up_loss"] == pytest.approx(again["mix_up_loss"], rel=1e-5)
    added = 2 * 0.005 * first["mix_up_loss"]
    assert again["loss"] == pytest.approx(first["loss"] + added, rel=1e-4)
    keys |= {"log_interval": 5, "val_interval": 5, "checkpoint_interval": 5}
    main(tiny(dataset, tmp_path / "rare", **keys))
    parts = [line["mix_up_loss"] for line in third if "mix_up_loss" in line]
    assert lines(tmp_path / "rare")[-1]["mix_up_loss"] == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_every_parameter_is_trained_also_one_without_a_dimension():
    """Regression: a temperature of a backbone of one's own was in no group of the optimiser."""
    model = torch.nn.Linear(3, 2)
    model.temperature = torch.nn.Parameter(torch.tensor(1.0))
    optimiser = train.build_optimiser(model, run_config)
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(p) for p in model.parameters()}


def test_the_mixed_view_is_of_the_days_of_view_a():
    """The other pixel is looked up at them: its i-th date may be of another month."""
    x, doys = torch.rand(20, 2, 6, 3), torch.rand(20, 365).argsort(1)[:, :12].add(1).short()
    doys = doys.view(20, 2, 6).sort(2).values
    mixed_x, mixed_doys, (weight, order) = transforms.add_mixed_view(x, doys, 0, slice(None), 20)
    assert mixed_x[:, :2].equal(x) and mixed_doys.equal(doys[:, [0, 1, 0]])
    for pixel, other in enumerate(order):
        dates = doys[other].flatten().argsort()
        for band in range(3):
            days, series = doys[other].flatten()[dates], x[other, ..., band].flatten()[dates]
            looked_up = torch.from_numpy(np.interp(doys[pixel, 0], days, series)).float()
            wanted = weight[pixel] * x[pixel, 0, :, band] + (1 - weight[pixel]) * looked_up
            torch.testing.assert_close(mixed_x[pixel, 2, :, band], wanted)


def test_blended_pixels_are_trained_on_and_predicted(dataset, tmp_path, monkeypatch):
    """Both views, and the observations to predict, must be of the same blended pixel."""
    seen, targets = [], []
    with monkeypatch.context() as patch:
        patch.setattr(
            barlow_twins.BarlowTwins, "forward", note_views(seen, barlow_twins.BarlowTwins.forward)
        )
        loss_of = barlow_twins.pretraining_loss
        patch.setattr(
            barlow_twins, "pretraining_loss", lambda *a: targets.append(a[2]) or loss_of(*a)
        )
        for share in (0.0, 0.5, 1.0):
            size = {"min_sample_size": 6, "mix_up": 0.0, "max_steps": 1, "augment": "none"}
            main(tiny(dataset, tmp_path / f"{share}", blend=share, **size))
    plain, half, every = seen
    for views, target in zip(seen, targets, strict=True):
        assert views.equal(target), "what is predicted is what is seen"
    moved, all_moved = ((views - plain).abs().flatten(1).mean(1) for views in (half, every))
    assert 0.3 < (moved > 0).float().mean() < 0.7, "half of the pixels"
    assert (all_moved > 0).all()
    assert all_moved.std() > 0.2 * all_moved.mean(), "each pixel by a share of its own"


def test_blending_mixing_and_augmenting_draw_numbers_of_their_own(dataset, tmp_path, monkeypatch):
    """Regression: their seeds differed by 2 ** 61, of which a CPU generator keeps nothing."""
    seeds, partners, numbers = [], transforms.random_partners, barlow_twins.BatchGenerator
    monkeypatch.setattr(
        transforms,
        "random_partners",
        lambda seed, *more: seeds.append(seed) or partners(seed, *more),
    )
    monkeypatch.setattr(
        barlow_twins, "BatchGenerator", lambda *a: seeds.append(a[2]) or numbers(*a)
    )
    keys = {"blend": 0.5, "mix_up": 1.0, "augment": "jitter_bands", "max_steps": 2}
    main(tiny(dataset, tmp_path / "out", **keys))
    firsts = {float(torch.rand(1, generator=torch.Generator().manual_seed(s))) for s in seeds}
    assert len(firsts) == len(seeds) == 6, "three in each of two steps"


def note_views(seen, forward):
    """A forward of BarlowTwins that keeps the views that it is trained on."""

    def noting(model, x, *more):
        seen.extend([x] if model.training else [])
        return forward(model, x, *more)

    return noting


def test_another_loss_is_used_by_training_and_validation_alike(dataset, tmp_path, monkeypatch):
    """A loss is one entry of LOSSES; nothing else has to know of it."""
    training = []

    def loss_of_seven(z, config, mixture=None):
        training.append(torch.is_grad_enabled())
        assert len(z) == 2 + bool(mixture)
        return 7 + 0 * z[0].sum(), {"part_of_seven": z[0].new_tensor(3.0)}

    monkeypatch.setitem(LOSSES, "seven", loss_of_seven)
    main(tiny(dataset, tmp_path / "out", loss="seven", max_steps=2, prediction=0.0))
    untrained, first, last = lines(tmp_path / "out")
    assert untrained["val_loss"] == last["val_loss"] == 7
    assert first["loss"] == last["loss"] == 7
    assert first["part_of_seven"] == 3
    assert training.count(True) == 2
    assert training.count(False) > 0


def test_an_augmentation_changes_the_views_that_train(dataset, tmp_path):
    for name in ("none", "jitter_bands"):
        main(tiny(dataset, tmp_path / name, augment=name, max_steps=2))
    plain, jittered = (lines(tmp_path / name) for name in ("none", "jitter_bands"))
    assert plain[0] == jittered[0], "validation looks at the views as they were drawn"
    assert plain[1]["loss"] != jittered[1]["loss"]
