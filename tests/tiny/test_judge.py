"""The judge: its bookkeeping against closed forms, its readings against drawings."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stepdistill.tiny import judge as judging
from stepdistill.tiny.judge import (
    CHANNELS,
    GRID,
    KINDS,
    Judge,
    Maps,
    decide,
    judge_loss,
    load_judge,
    look,
    read,
    targets,
)
from stepdistill.tiny.make.judge import accuracy, blurred, damaged
from stepdistill.tiny.world import BACKGROUNDS, Scene, Thing, draw, scenes


def perfect(wanted) -> Maps:
    """The maps that say exactly what the targets want."""
    cells = {"heat": wanted.heat.logit(eps=1e-6)}
    for name, want in wanted.attributes.items():
        cells[name] = 30 * F.one_hot(want, CHANNELS[name]).movedim(-1, 1).float() if name in KINDS else want
    background = 30 * F.one_hot(wanted.background, len(BACKGROUNDS)).float()
    return Maps(cells, background, torch.zeros(len(background), 3), torch.zeros(len(background), judging.FEATURES))


def test_targets_and_decisions_are_inverse():
    drawn = scenes(60, 31)
    drawings = draw(drawn, 31)
    for i, reading in enumerate(decide(perfect(targets(drawn, drawings)))):
        assert reading.background == drawn[i].background
        assert len(reading.things) == len(drawn[i].things)
        for k, thing in enumerate(drawn[i].things):
            x, y = drawings.position[i, k]
            found = min(reading.things, key=lambda one: np.hypot(one.x - x, one.y - y))
            assert tuple(found[:3]) == tuple(thing)
            np.testing.assert_allclose((found.x, found.y), (x, y), atol=1e-4)
            np.testing.assert_allclose(found.radius, drawings.radius[i, k], atol=1e-4)
            np.testing.assert_allclose(found.rgb, drawings.rgb[i, k], atol=1e-4)


def test_heat_is_the_nearest_objects():
    drawn = [Scene((Thing("small", "red", "bar"),), None, "plain")]
    drawings = draw(drawn, 1)
    x, y = drawings.position[0, 0] / 4
    rows, columns = np.mgrid[:GRID, :GRID] + 0.5
    closed = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 2)
    np.testing.assert_allclose(targets(drawn, drawings).heat[0, 0], closed, atol=1e-5)


def test_loss_is_least_at_the_targets():
    drawn = scenes(8, 32)
    wanted = targets(drawn, draw(drawn, 32))
    right, none = perfect(wanted), torch.zeros(8, 3)
    entropy = GRID * F.binary_cross_entropy(wanted.heat, wanted.heat)
    assert judge_loss(right, wanted, none).item() == pytest.approx(entropy.item(), rel=1e-3)
    for name, want in wanted.attributes.items():
        worse = right.cells | {name: right.cells[name].roll(1, dims=1) if name in KINDS else want + 1}
        assert judge_loss(right._replace(cells=worse), wanted, none) > judge_loss(right, wanted, none) + 0.9
    assert judge_loss(right, wanted, none + 1).item() == pytest.approx(entropy.item() + 1, rel=1e-3)


def test_no_object_and_too_many():
    maps = perfect(targets(scenes(1, 33), draw(scenes(1, 33), 33)))
    empty = maps._replace(cells=maps.cells | {"heat": torch.full((1, 1, GRID, GRID), -9.0)})
    assert decide(empty)[0].things == ()
    lattice = torch.full((1, 1, GRID, GRID), -9.0)
    lattice[..., ::3, ::3] = 9 + torch.rand(6, 6)
    assert len(decide(maps._replace(cells=maps.cells | {"heat": lattice}))[0].things) == judging.MOST


def test_blur_of_an_impulse_has_its_variance():
    impulse = torch.zeros(2, 1, 15, 15)
    impulse[..., 7, 7] = 1
    y = blurred(impulse, torch.tensor([0.0, 0.9]))
    torch.testing.assert_close(y[0], impulse[0])
    assert y[1].sum().item() == pytest.approx(1, abs=1e-5)
    variance = (y[1, 0].sum(0) * (torch.arange(15) - 7) ** 2).sum().item()
    assert variance == pytest.approx(0.81, rel=0.02)


def test_damage_leaves_the_undamaged_alone():
    torch.manual_seed(0)
    x = judging.to_net(draw(scenes(64, 34), 34).images)
    y, strength = damaged(x)
    clean = (strength == 0).all(1)
    assert clean.any() and y.abs().max() <= 1
    torch.testing.assert_close(y[clean], x[clean], atol=1e-5, rtol=0)
    assert ((y - x).flatten(1).abs().mean(1)[~clean] > 0).all()


def test_small_and_strict():
    judge = Judge()
    assert sum(p.numel() for p in judge.parameters()) < 500_000
    assert judge.features(torch.zeros(2, 3, 64, 64)).shape == (2, judging.FEATURES)
    with pytest.raises(ValueError, match="resize"):
        judge(torch.zeros(1, 3, 32, 32))
    assert read(judge.eval(), np.zeros((0, 64, 64, 3), np.uint8)) == []


def test_missing_weights_name_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(judging, "WEIGHTS", tmp_path / "judge.safetensors")
    with pytest.raises(FileNotFoundError, match=r"tiny\.make judge"):
        load_judge()


@pytest.mark.parametrize("split", ["all", "held"])
def test_reads_fresh_drawings(split):
    drawn = scenes(500 if split == "all" else 200, 35, split)
    shares = accuracy(load_judge(), drawn, draw(drawn, 35))
    assert min(shares.values()) >= 0.99, shares


def test_features_do_not_depend_on_the_batch_and_have_unit_spread():
    images = draw(scenes(300, 36), 36).images
    judge = load_judge()
    rows, readings = look(judge, images)
    np.testing.assert_allclose(look(judge, images[:50], batch=7)[0], rows[:50], atol=1e-4)
    assert read(judge, images[:3])[1].background == readings[1].background
    assert 0.8 < np.median(rows.std(0)) < 1.25
