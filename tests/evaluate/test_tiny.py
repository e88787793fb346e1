"""Alignment and diversity of hand-built readings with known scores; the embedded world's reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepdistill.errors import UserError
from stepdistill.evaluate import tiny
from stepdistill.evaluate.features import FEATURES
from stepdistill.evaluate.frechet import frechet_interval
from stepdistill.evaluate.readings import alignment, diversity, match, score, variances
from stepdistill.evaluate.references import reference
from stepdistill.show import Line
from stepdistill.tiny.judge import WEIGHTS, Found, Reading, load_judge, look
from stepdistill.tiny.make.judge import blurred
from stepdistill.tiny.world import Drawings, Scene, Thing, draw, scenes

BAR, RING, DISC = Thing("small", "red", "bar"), Thing("large", "blue", "ring"), Thing("large", "green", "circle")


def at(thing, x, y, **other):
    return Found(*thing._replace(**other), x, y, 5.0, (0.5, 0.5, 0.5))


def truth(scene: Scene, drawings: Drawings, i: int) -> Reading:
    """What a faultless judge reads, objects in reverse order."""
    places = zip(*(column[i].tolist() for column in drawings[1:]), strict=True)
    found = [Found(*thing, *xy, r, tuple(rgb)) for thing, (xy, r, rgb) in zip(scene.things, places, strict=False)]
    return Reading(scene.background, tuple(reversed(found)))


def pair(*found, background="plain"):
    """Score of a reading of 'a small red bar left of a large blue ring on a plain background': 8 stated attributes."""
    return score(Scene((BAR, RING), "left of", "plain"), Reading(background, found))


def test_true_readings_score_one():
    drawn = scenes(300, 41)
    drawings = draw(drawn, 41)
    found = alignment(drawn, [truth(scene, drawings, i) for i, scene in enumerate(drawn)])
    assert set(vars(found).values()) == {1.0}


def test_single_faults():
    assert pair(at(RING, 50, 30), at(BAR, 14, 32)) == (1, True)
    assert pair(at(BAR, 50, 30), at(RING, 14, 32)) == (7 / 8, False)  # swapped relation
    assert pair(at(BAR, 14, 14), at(RING, 30, 50)) == (7 / 8, False)  # more below than beside
    assert pair(at(RING, 50, 30)) == (4 / 8, False)  # missing object, and with it the relation
    assert pair(at(RING, 50, 30), at(BAR, 14, 32), at(DISC, 30, 50)) == (1, False)  # extra object
    assert pair(at(BAR, 14, 32), at(RING, 50, 30, colour="pink")) == (7 / 8, False)
    assert pair(at(BAR, 14, 32), at(RING, 50, 30), background="striped") == (7 / 8, False)
    assert pair() == (1 / 8, False)
    assert score(Scene((BAR,), None, "plain"), Reading("plain", (at(DISC, 9, 9),))) == (1 / 4, False)


def test_swapped_colours_cost_two():
    swapped = at(BAR, 14, 32, colour="blue"), at(RING, 50, 30, colour="red")
    assert pair(*swapped) == (6 / 8, False)


def test_relation_must_hold_between_all_neighbours():
    scene = Scene((BAR, RING, DISC), "above", "gradient")
    assert score(scene, Reading("gradient", (at(DISC, 30, 53), at(BAR, 30, 11), at(RING, 30, 32)))) == (1, True)
    assert score(scene, Reading("gradient", (at(DISC, 30, 32), at(BAR, 30, 11), at(RING, 30, 53)))) == (10 / 11, False)


def test_twins_are_matched_so_that_the_relation_holds():
    scene = Scene((BAR, BAR._replace(colour="red")), "below", "plain")
    for order in ((0, 1), (1, 0)):
        found = [at(BAR, 30, 50), at(BAR, 30, 14)]
        reading = Reading("plain", tuple(found[k] for k in order))
        assert score(scene, reading) == (1, True)
        assert match(scene, reading) == tuple(found)


def test_groups_are_kept_apart():
    seen, held = (Scene((Thing("small", "red", shape),), None, "plain") for shape in ("circle", "square"))
    assert held.held_out and not seen.held_out
    found = alignment([seen, held], [Reading("plain", (at(seen.things[0], 9, 9),)), Reading("plain", ())])
    assert (found.alignment, found.alignment_1, found.alignment_seen, found.alignment_held) == (0.625, 0.625, 1, 0.25)
    assert (found.whole, found.whole_seen, found.whole_held) == (0.5, 1, 0)
    assert found.alignment_2 is None and found.whole_3 is None


def drawn_groups(captions, n, seed):
    groups = []
    for c, scene in enumerate(captions):
        drawings = draw([scene] * n, seed + c)
        groups.append([truth(scene, drawings, i) for i in range(n)])
    return groups


def test_diversity_of_drawings_is_one_and_of_one_picture_zero():
    captions = tiny.diversity_prompts(16)
    assert [len(scene.things) for scene in captions[:4]] == [1, 2, 1, 2]
    own = np.array([variances(*pair) for pair in zip(captions, drawn_groups(captions, 100, 50), strict=True)])
    groups = drawn_groups(captions, 16, 500)
    assert diversity(captions, groups, own) == pytest.approx((1, 1, 1, 1), abs=0.12)
    assert diversity(captions, [[group[0]] * 16 for group in groups], own) == pytest.approx((0, 0, 0, 0), abs=1e-6)


def test_diversity_is_a_ratio_of_spreads():
    scene, near = Scene((BAR,), None, "plain"), [at(BAR, x, 32 - x) for x in (9.0, 11.0, 14.0)]
    wide = [one._replace(x=3 * one.x, y=3 * one.y) for one in near]
    own, got = (variances(scene, [Reading("plain", (one,)) for one in ones]) for ones in (near, wide))
    assert got[0, 0] == pytest.approx(9 * own[0, 0])
    assert own[0, 3] == 3 and np.isnan(own[1, :3]).all() and own[1, 3] == 0


def test_mistakes_and_missing_objects_are_no_diversity():
    captions = [Scene((BAR, RING), "left of", "plain")]
    own = np.array([variances(captions[0], drawn_groups(captions, 100, 60)[0])])
    group = drawn_groups(captions, 16, 70)[0]
    spoilt = [*group, Reading("plain", ()), Reading("plain", (at(DISC, 1, 1), at(BAR, 60, 60, colour="pink")))]
    assert diversity(captions, [spoilt], own) == diversity(captions, [group], own)
    assert diversity(captions, [[Reading("plain", ())] * 16], own) == (None,) * 4


def test_distance_notices_damage():
    """Blur, one colour for all, one object too few: each is far outside the interval of drawings."""
    judge, against = load_judge(), tiny.reference().moments
    drawn = tiny.prompts(400)
    images = draw(drawn, 42).images
    _, _, top = frechet_interval(look(judge, images)[0], against)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    soft = blurred(x, torch.full((400,), 1.2)).permute(0, 2, 3, 1).round().byte().numpy()
    fewer = [Scene(scene.things[:1], None, scene.background) for scene in drawn]
    red = [Scene(tuple(t._replace(colour="red") for t in s.things), s.relation, s.background) for s in drawn]
    for other in (soft, draw(fewer, 42).images, draw(red, 42).images):
        assert frechet_interval(look(judge, other)[0], against)[1] > 1.2 * top


def test_shipped_reference_is_of_the_shipped_judge(capsys):
    tiny.reference.cache_clear()
    made = tiny.reference()
    assert capsys.readouterr().err == "", "reference.safetensors is another judge's: run python -m stepdistill.evaluate"
    assert made.variances.shape == (tiny.DIVERSITY_CAPTIONS, 3, 4)
    first = look(load_judge(), draw(scenes(24, tiny.SEED_REFERENCE, "all"), tiny.SEED_REFERENCE).images)[0]
    assert made.features.shape == (tiny.PICTURES, 64)
    np.testing.assert_allclose(made.features[:24], first, atol=1e-4)
    error = made.features.mean(0) - made.moments.mean.numpy()
    assert np.abs(error).max() < 4 * 1 / np.sqrt(tiny.PICTURES)  # each feature is of unit spread
    fd, low, high = tiny.floor()
    assert 0 <= low <= fd <= high < 0.5
    assert WEIGHTS.stat().st_size < 1_000_000


def test_the_judge_as_features_and_its_reference(tmp_path):
    net, drawn = FEATURES["judge"](torch.device("cpu")), draw(scenes(70, 43), 43).images
    rows = net(drawn)
    assert rows.dtype == np.float32 and rows.shape == (70, net.dim)
    np.testing.assert_allclose(rows, look(load_judge(), drawn)[0], atol=1e-4)
    np.testing.assert_allclose(net(drawn[3:4]), rows[3:4], atol=1e-4)
    with pytest.raises(UserError, match="65x64 pixels is not of the embedded world"):
        net(np.zeros((1, 64, 65, 3), np.uint8))
    made = reference("stepdistill/tiny", net, (64, 64), tmp_path, Line())
    assert made.about["n"] == tiny.DRAWINGS and torch.equal(made.moments.mean, tiny.reference().moments.mean)
    assert made.features.shape == (tiny.PICTURES, net.dim)
    net = replace(net, name="other")
    with pytest.raises(UserError, match=r"stepdistill/tiny differs: features is 'embedded judge .*, not 'other'"):
        reference("stepdistill/tiny", net, None, tmp_path, Line())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="0 to 32"):
        tiny.diversity_prompts(33)
    with pytest.raises(ValueError):
        alignment(scenes(2, 0), [])


def test_without_captions_there_is_no_diversity():
    assert diversity([], [], tiny.reference().variances[:0]) == (None, None, None, None)
