"""Every backbone: shapes, dependence on the day of year, masks, batches of one; heads; loss."""

from running.device import start_runtime
from running.errors import InputError

import pytest
import torch
import torch.nn.functional as F

from backbones import (
    BACKBONES,
    Classifier,
    attend_fast,
    build_backbone,
    focal_loss,
    load_backbone,
)
from transforms import encode_days

SIZES = {"num_bands": 4, "sample_size": 6, "latent_dim": 10, "width": 16, "depth": 2}


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    return build_backbone(request.param, **SIZES).eval()


def batch(pixels=5, dates=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(pixels, dates, 4, generator=generator)
    doys = torch.randint(1, 366, (pixels, dates), generator=generator).sort(1).values
    return x, doys


def test_the_days_of_a_transformer_end_at_a_harmonic():
    """And a checkpoint of before there was such a key reads its days as it did."""
    x, doys = torch.zeros(2, 6, 4), torch.arange(1, 13).view(2, 6) * 30
    torch.manual_seed(0)
    old = build_backbone("transformer", **SIZES)
    for cycles, features in ((0, 16), (2, 4), (8, 16), (100, 16)):
        torch.manual_seed(0)
        backbone = build_backbone("transformer", **SIZES, day_cycles=cycles)
        assert backbone.day_features == features
        assert backbone(x, doys).equal(old(x, doys)) == (features == 16)


def test_gives_one_representation_a_pixel(backbone):
    assert backbone(*batch()).shape == (5, 10)
    assert backbone.latent_dim == 10


def test_depends_on_the_day_of_year(backbone):
    """The day of year must reach the model; a date's position in the series is no substitute."""
    x, doys = batch()
    moved = (backbone(x, doys) - backbone(x, doys + 60)).abs().max(1).values
    assert (moved > 1e-3).all()


def test_days_may_be_of_any_number_type(backbone):
    x, doys = batch()
    for dtype in (torch.int16, torch.int64, torch.float32):
        torch.testing.assert_close(backbone(x, doys), backbone(x, doys.to(dtype)))


def test_a_batch_of_one_is_like_a_row_of_many(backbone):
    """Guards against a squeeze() that removes the batch dimension of a single pixel."""
    x, doys = batch()
    alone = backbone(x[:1], doys[:1])
    assert alone.shape == (1, 10)
    torch.testing.assert_close(alone, backbone(x, doys)[:1], atol=1e-5, rtol=1e-4)


def test_a_rotation_of_the_checkpoint_becomes_part_of_the_last_layer(backbone):
    """So maps and fine-tuning have ordered dimensions, and the resumed training has its own."""
    kind = next(name for name in BACKBONES if type(backbone) is BACKBONES[name])
    content = {"backbone": {"name": kind, **SIZES}, "backbone_state": backbone.state_dict()}
    rotation = torch.linalg.qr(torch.randn(10, 10))[0]
    ordered = load_backbone(content | {"rotation": rotation})(*batch())
    torch.testing.assert_close(ordered, backbone(*batch()) @ rotation, atol=1e-5, rtol=1e-4)
    assert load_backbone(content | {"rotation": None})(*batch()).equal(backbone(*batch()))
    for wrong in (rotation * float("nan"), rotation[:, :9], 1.0):
        with pytest.raises(InputError, match="found a backbone that cannot be built"):
            load_backbone(content | {"rotation": wrong})


def test_all_parameters_learn(backbone):
    x, doys = batch(16)
    backbone(x, doys).square().sum().backward()
    dead = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_transformer_reads_dates_and_not_places():
    torch.manual_seed(0)
    encoder = build_backbone("transformer", **SIZES).eval()
    x, doys = batch()
    order = torch.randperm(6)
    torch.testing.assert_close(
        encoder(x, doys), encoder(x[:, order], doys[:, order]), atol=1e-5, rtol=1e-4
    )


def test_transformer_ignores_padding_of_any_length():
    torch.manual_seed(0)
    encoder = build_backbone("transformer", **SIZES).eval()
    x, doys = batch()
    for dates in (1, 4, 6):
        padded = torch.cat([x[:, :dates], 1e6 * torch.ones(5, 9, 4)], 1)
        days = torch.cat([doys[:, :dates], torch.zeros(5, 9)], 1)
        torch.testing.assert_close(
            encoder(padded, days, days == 0),
            encoder(x[:, :dates], doys[:, :dates]),
            atol=1e-5,
            rtol=1e-4,
        )


@pytest.mark.parametrize("padding", [0, 5])
def test_mapping_gives_the_values_of_training(padding):
    """It takes fused kernels of the same weights; see `Runtime.inference`."""
    torch.manual_seed(0)
    encoder = build_backbone("transformer", **SIZES | {"width": 64}).eval()
    x, doys = batch(pixels=40, dates=21)
    mask = torch.arange(21) >= 21 - torch.arange(40)[:, None] % (padding + 1)
    mask = mask if padding else None
    trained = encoder(x, doys, mask)
    with start_runtime("cpu").inference():
        mapped = encoder(x, doys, mask)
    torch.testing.assert_close(mapped, trained, atol=1e-5, rtol=0)
    assert trained.requires_grad
    assert not mapped.requires_grad


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_fast_attention_is_attention(scale, sign, masked):
    """Also where exp of a score is no float32: above and far below its range."""
    generator = torch.Generator().manual_seed(2)
    query, key, value = torch.randn(3, 7, 2, 9, 16, generator=generator)
    query, key = query.abs() * scale, sign * key.abs()  # scores of one sign: rows of tiny sums
    mask = (torch.arange(9) >= torch.tensor([9, 1, 5, 9, 8, 2, 9])[:, None])[:, None, None]
    found = attend_fast(query, key, value, mask if masked else None)
    score = (query.double() @ key.double().mT) / 4
    score = score.masked_fill(mask, -torch.inf) if masked else score
    wanted = (score.softmax(-1) @ value.double()).float()
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_no_grad_alone_changes_no_bit_of_training():
    """A frozen backbone is trained on: its representations stay what they were."""
    encoder = build_backbone("transformer", **SIZES | {"width": 64}).eval()
    x, doys = batch(pixels=40, dates=21)
    with torch.no_grad():
        frozen = encoder(x, doys)
    assert torch.equal(frozen, encoder(x, doys))


def test_compiled_it_is_one_graph():
    """On a GPU; a question that the compiler cannot trace would break it at every layer."""
    encoder = build_backbone("transformer", **SIZES).eval()
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch()), encoder(*batch()))


def test_day_encoding_is_harmonic_and_yearly():
    doys = torch.tensor([[1.0, 100.0, 366.25]])
    features = encode_days(doys, 8)
    assert features.shape == (1, 3, 8)
    torch.testing.assert_close(features[:, 0], features[:, 2], atol=1e-4, rtol=0)
    angle = 2 * torch.pi * 3 * 100 / 365.25
    assert float(features[0, 1, 2]) == pytest.approx(
        float(torch.sin(torch.tensor(angle))), abs=1e-4
    )


def test_a_misspelt_knob_is_not_swallowed():
    with pytest.raises(TypeError):
        build_backbone("transformer", **SIZES, dropuot=0.1)
    with pytest.raises(ValueError, match="wanted one of mlp, cnn, transformer"):
        build_backbone("transfomer", **SIZES)


def test_attention_head_needs_features_of_dates():
    backbone = build_backbone("mlp", num_bands=4, sample_size=6, latent_dim=8, width=16, depth=1)
    with pytest.raises(ValueError, match="not SimpleMLP"):
        Classifier(backbone, head="attention", num_classes=2, dropout=0.0)


def test_focal_loss_is_cross_entropy_at_gamma_0_and_smaller_above():
    logits, target = torch.randn(50, 3), torch.randint(3, (50,))
    plain = F.cross_entropy(logits, target)
    torch.testing.assert_close(focal_loss(logits, target, 0.0), plain)
    probability = logits.softmax(1)[torch.arange(50), target]
    wanted = -((1 - probability) ** 2 * probability.log()).mean()
    torch.testing.assert_close(focal_loss(logits, target, 2.0), wanted)
    weight = torch.tensor([1.0, 2.0, 0.5])
    torch.testing.assert_close(
        focal_loss(logits, target, 0.0, weight),
        F.cross_entropy(logits, target, weight=weight),
    )


def test_a_backbone_that_breaks_the_contract_is_refused(monkeypatch):
    """Regression: it trained to the end and crashed while the picture was drawn."""

    class Incomplete(torch.nn.Module):
        latent_dim, any_length = 10, False

        def __init__(self, **_):
            super().__init__()

    monkeypatch.setitem(BACKBONES, "incomplete", Incomplete)
    with pytest.raises(ValueError, match="backbone=incomplete: wanted the attribute sample_size"):
        build_backbone("incomplete", **SIZES)
