"""The embedded world keeps its promises: determinism, captions, held-out combinations, anti-aliased drawings."""

from itertools import pairwise

import numpy as np
import pytest

from stepdistill.tiny.world import COLOURS, HELD_OUT, PALETTE, RELATIONS, SHAPES, Scene, Thing, draw, scenes


def test_row_does_not_depend_on_how_many_were_asked_for():
    many, few = scenes(530, 7), scenes(20, 7)
    assert many[:20] == few
    ends = [many[i] for i in range(530)]  # beyond one chunk of the drawing loop
    for whole, part in zip(draw(ends, 7), draw(ends[:20], 7), strict=True):
        np.testing.assert_array_equal(whole[:20], part)


def test_seed_decides():
    assert scenes(50, 1) == scenes(50, 1)
    assert scenes(50, 1) != scenes(50, 2)
    scene = scenes(1, 3)
    assert (draw(scene, 1).images == draw(scene, 1).images).all()
    assert (draw(scene, 1).images != draw(scene, 2).images).any()


def test_one_caption_has_many_pictures():
    drawings = draw([Scene((Thing("small", "red", "bar"),), None, "plain")] * 64, 4)
    assert drawings.position[:, 0].std(0).min() > 5
    assert drawings.radius[:, 0].std() > 0.2
    assert drawings.rgb[:, 0, 0].std() > 0.02


@pytest.mark.parametrize("split", ["seen", "held", "all"])
def test_captions_round_trip(split):
    for scene in scenes(300, 5, split):
        assert Scene.parse(scene.caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a large red circle",
        "a large red circle on a dotted background",
        "a large mauve circle on a plain background",
        "a large red circle near a small blue bar on a plain background",
        "a large red circle left of a small blue bar above a small red ring on a plain background",
        "two large red circles on a plain background",
    ],
)
def test_other_sentences_are_refused(caption):
    with pytest.raises(ValueError, match="not of this world"):
        Scene.parse(caption)


def test_held_out_combinations():
    assert {colour for _, colour in HELD_OUT} == set(COLOURS) and {shape for shape, _ in HELD_OUT} == set(SHAPES)
    assert not any(scene.held_out for scene in scenes(3000, 6, "seen"))
    held = scenes(1000, 6, "held")
    assert all((scene.things[0].shape, scene.things[0].colour) in HELD_OUT for scene in held)
    assert 0.1 < np.mean([scene.held_out for scene in scenes(2000, 6, "all")]) < 0.5
    with pytest.raises(ValueError, match="sene"):
        scenes(1, 0, "sene")


def test_drawings_obey_captions():
    drawn = scenes(400, 8)
    drawings = draw(drawn, 8)
    for scene, position, radius in zip(drawn, drawings.position, drawings.radius, strict=True):
        count = len(scene.things)
        assert np.isfinite(position[:count]).all() and np.isnan(position[count:]).all()
        assert all((r > 8) == (thing.size == "large") for r, thing in zip(radius, scene.things, strict=False))
        if scene.relation:
            axis, direction = RELATIONS[scene.relation]
            for a, b in pairwise(position[:count]):
                assert direction * (b - a)[axis] > abs((b - a)[1 - axis])


@pytest.mark.parametrize(
    ("shape", "area", "edge"),
    [
        ("circle", lambda r: np.pi * r**2, lambda r: 2 * np.pi * r),
        ("square", lambda r: (1.76 * r) ** 2, lambda r: 7.04 * r),
        ("bar", lambda r: 2.04 * 0.84 * r**2, lambda r: 5.76 * r),
        ("ring", lambda r: np.pi * (1.02**2 - 0.5**2) * r**2, lambda r: 2 * np.pi * 1.52 * r),
    ],
)
def test_edges_are_anti_aliased(shape, area, edge):
    """Summed cover is the area, its centre the object's, and most pixels of the edge are mixed."""
    drawings = draw([Scene((Thing("large", "red", shape),), None, "plain")] * 20, 9)
    for image, position, radius, rgb in zip(*(column for column in drawings), strict=True):
        back = image[0, 0] / 255
        cover = (image / 255 - back) @ (rgb[0] - back) / np.square(rgb[0] - back).sum()  # [64, 64]
        assert cover.sum() == pytest.approx(area(radius[0]), rel=0.03)
        y, x = np.mgrid[:64, :64] + 0.5
        centre = np.array([(x * cover).sum(), (y * cover).sum()]) / cover.sum()
        np.testing.assert_allclose(centre, position[0], atol=0.15)
        assert ((cover > 0.05) & (cover < 0.95)).sum() > 0.5 * edge(radius[0])


def test_colours_are_the_palettes():
    drawings = draw([Scene((Thing("large", colour, "circle"),), None, "plain") for colour in COLOURS], 10)
    for colour, image, position in zip(COLOURS, drawings.images, drawings.position, strict=True):
        middle = image[int(position[0, 1]), int(position[0, 0])] / 255
        distances = {name: np.abs(middle - np.array(rgb) / 255).sum() for name, rgb in PALETTE.items()}
        assert min(distances, key=distances.get) == colour
