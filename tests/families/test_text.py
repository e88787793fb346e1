"""Texts of different lengths, as rows that can be batched anew."""

import torch

from stepdistill.families.text import padded, ragged, trimmed

ROWS = [torch.randn(length, 4) for length in (3, 5, 1)]


def test_ragged_undoes_padded():
    cond = padded(ROWS, 8)
    assert cond["text"].shape == (3, 8, 4) and not cond["text"][2, 1:].any()
    assert all(torch.equal(a, b) for a, b in zip(ragged(**cond), ROWS, strict=True))


def test_trimmed_is_as_long_as_its_longest_row_and_masked_only_where_it_must_be():
    cond = padded(ROWS, 8)
    text, mask = trimmed(**cond)
    assert text.shape == (3, 5, 4) and mask.sum(1).tolist() == [3, 5, 1]
    text, mask = trimmed(cond["text"][:1], cond["mask"][:1])
    assert torch.equal(text[0], ROWS[0]) and mask is None
