"""Aspect-ratio buckets: which there are, who is in them, and how they are visited."""

import collections

import pytest
import torch
from PIL import Image
from students import student
from written import only, swapped, write

from stepdistill.data import Batches, build_batches
from stepdistill.data.buckets import Bucket, bucket_sizes, nearest
from stepdistill.trainer import Trainer


def test_the_sizes_of_sdxl_s_paper_s_kind():
    sizes = bucket_sizes((1024, 1024), 8)
    assert {(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (1344, 768)} <= set(sizes)
    assert all((width, height) in sizes for height, width in sizes)


@pytest.mark.parametrize(
    ("size", "multiple"), [((64, 64), 8), ((512, 512), 16), ((480, 832), 16), ((1024, 1024), 32), ((16, 16), 2)]
)
def test_sizes_have_about_the_area_and_can_be_divided(size, multiple):
    sizes, area = bucket_sizes(size, multiple), size[0] * size[1]
    assert size in sizes and len(sizes) > 4
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert 0.5 <= height / width <= 2 and abs(height * width / area - 1) < 0.13


def test_a_picture_goes_where_least_is_cut():
    sizes = bucket_sizes((1024, 1024), 64)
    assert nearest(500, 500, sizes) == (1024, 1024)
    assert nearest(4000, 3000, sizes) == (896, 1152) and nearest(3000, 4000, sizes) == (1152, 896)
    height, width = nearest(9000, 100, sizes)
    assert width / height == max(w / h for h, w in sizes)


def batches(**settings):
    rows = torch.arange(11.0)
    buckets = (Bucket((2, 3), (0, 2, 4, 6, 8, 10, 1)), Bucket((3, 2), (3, 5)), Bucket((1, 6), (7, 9)))
    made = {"cond": {"text": rows[:, None]}, "null": None, "prompts": tuple(map(str, range(11))), "x0": rows[:, None]}
    return Batches(**{**made, "shape": (2, 3), "batch": 4, "seed": 7, "buckets": buckets, **settings})


def bucket_of(made, rows):
    (found,) = {k for k, bucket in enumerate(made.buckets) for row in rows if row in bucket.rows}
    return found


def test_every_iteration_has_one_bucket_and_every_picture_comes_each_epoch():
    made, epochs = batches(), []
    assert len(made.visits) == 4  # two batches of the large bucket, one of each small one, which is filled
    for epoch in range(2):
        seen = []
        for step in range(4 * epoch, 4 * epoch + 4):
            batch, _ = made(step, 0)
            rows = [int(prompt) for prompt in batch.prompts]
            assert batch.noise.shape == (4, *made.buckets[bucket_of(made, rows)].shape)
            assert batch.x0.flatten().tolist() == batch.cond["text"].flatten().tolist() == rows
            seen.append(tuple(rows))
        count = collections.Counter(row for rows in seen for row in rows)
        assert set(count) == set(range(11)) and count[3] == count[5] == count[7] == count[9] == 2
        assert sum(count[row] for row in made.buckets[0].rows) == 8 and max(count.values()) == 2
        epochs.append(seen)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("alone", [False, True])
def test_a_bucketed_batch_is_a_pure_function_of_seed_and_step(alone):
    how = {"x0": None, "buckets": tuple(Bucket((n, 6 // n), None) for n in (1, 2, 3))} if alone else {}
    whole, other = batches(**how), batches(**how)
    [other(step, 0) for step in (9, 2)]
    split = [batches(**how, parts=2, world=2, rank=rank) for rank in range(2)]
    for step in range(8):
        batch, same = whole(step, 0)[0], other(step, 0)[0]
        pieces = [split[rank](step, part)[0] for part in range(2) for rank in range(2)]
        assert torch.equal(batch.noise, same.noise) and batch.prompts == same.prompts
        assert torch.equal(batch.noise, torch.cat([piece.noise for piece in pieces]))
        assert batch.prompts == sum((piece.prompts for piece in pieces), ())
    assert [whole.samples(step) for step in range(8)] != [batches(**how, seed=8).samples(step) for step in range(8)]


def test_prompts_alone_draw_their_shape_and_come_in_the_order_they_have_without_buckets():
    buckets = tuple(Bucket((n, 6 // n), None) for n in (1, 2, 3))
    made, plain = batches(x0=None, buckets=buckets), batches(x0=None, buckets=())
    shapes = {made.samples(step)[0] for step in range(30)}
    assert shapes == {(1, 6), (2, 3), (3, 2)}
    assert all(made.samples(step)[1] == plain.samples(step)[1] for step in range(30))


def test_pictures_keep_their_shape_from_folder_to_batch(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("a", (64, 64)), ("b", (90, 60)), ("c", (60, 90)), ("d", (60, 90))):
        Image.new("RGB", size, "red").save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(name)
    made = student(tmp_path, "eps", f"data.images={pictures}", "data.buckets=true", "train.batch=2")
    for _again in range(2):
        data = build_batches(made.recipe, made.family, cache=tmp_path / "cache")
        shapes = {bucket.shape: [data.prompts[i] for i in bucket.rows] for bucket in data.buckets}
        assert sorted(shapes.values()) == [["a"], ["b"], ["c", "d"]]
        assert shapes[made.family.shape] == ["a"] and len(data.visits) == 3
        for step in range(3):
            batch, _ = data(step, 0)
            assert batch.x0.shape == batch.noise.shape and batch.x0.shape[1:] in shapes


def test_a_student_trains_in_buckets(tmp_path):
    made = student(tmp_path, "sdxl", "data.buckets=true", "data.count=4", "train.batch=2", strategy="{name: dmd2}")
    data = build_batches(made.recipe, made.family)
    trainer = Trainer(made, data)
    shapes = {data.samples(step)[0] for step in range(2)}
    for _step in range(2):
        trainer.step()
    assert len(shapes) == 2


def test_pairs_have_one_size(root):
    assert "pairs of strategy dmd have one size" in only(
        write(root, swapped("  name: lcm\n  guidance: [2.0, 6.0]", "  name: dmd")), "data.buckets=true"
    )
