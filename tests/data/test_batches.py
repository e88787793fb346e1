"""Batches are a pure function of seed and step, however they are split."""

import torch

from stepdistill.data import Batches


def batches(**settings) -> Batches:
    rows = torch.arange(10.0)
    made = {"cond": {"text": rows[:, None]}, "null": {"text": -torch.ones(1, 1)}, "prompts": tuple(map(str, range(10)))}
    return Batches(**{**made, "x0": rows[:, None, None], "shape": (2, 3), "batch": 4, "seed": 7, **settings})


def seen(made: Batches, step: int) -> list[tuple[str, float]]:
    """Prompt and first noise value of every sample of a step, over all parts."""
    parts = [made(step, part)[0] for part in range(made.parts)]
    return [(p, float(z[0, 0])) for batch in parts for p, z in zip(batch.prompts, batch.noise, strict=True)]


def test_a_batch_does_not_depend_on_what_was_asked_before():
    one, two = batches(), batches()
    one(0, 0), one(5, 0)
    assert seen(one, 3) == seen(two, 3)
    assert seen(one, 3) != seen(batches(seed=8), 3)


def test_parts_and_processes_share_out_the_same_samples():
    whole = seen(batches(), 2)
    assert seen(batches(parts=4), 2) == whole
    assert [x for rank in range(2) for x in seen(batches(world=2, rank=rank), 2)] == whole
    split = {(part, rank): batches(parts=2, world=2, rank=rank)(2, part) for part in range(2) for rank in range(2)}
    assert [i for key in sorted(split) for i in split[key][1]] == [0, 1, 2, 3]


def test_every_row_comes_once_an_epoch_and_epochs_differ():
    made = batches(batch=5)
    first, second = ([p for step in steps for p, _ in seen(made, step)] for steps in ((0, 1), (2, 3)))
    assert sorted(first) == sorted(second) == sorted(made.prompts)
    assert first != second


def test_rows_stay_together_and_null_has_the_batch():
    batch, index = batches()(1, 0)
    assert list(index) == [0, 1, 2, 3]
    for i, prompt in enumerate(batch.prompts):
        assert float(batch.cond["text"][i]) == float(batch.x0[i]) == float(prompt)
    assert batch.noise.shape == (4, 2, 3)
    assert batch.null["text"].tolist() == [[-1.0]] * 4


def test_a_pair_s_noise_stays_with_its_picture_and_prompt():
    noise = torch.arange(10.0)[:, None, None].expand(10, 2, 3)
    for step in range(4):  # more than an epoch
        batch, _ = batches(noise=noise)(step, 0)
        assert batch.noise.shape == (4, 2, 3)
        assert batch.noise[:, 0, 0].tolist() == batch.x0.flatten().tolist() == [float(prompt) for prompt in batch.prompts]


def test_without_pictures_and_without_null():
    batch, _ = batches(x0=None, null=None)(0, 0)
    assert batch.x0 is None and batch.null is None
