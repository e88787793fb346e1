"""Prompts are encoded once, and kept as the network hears them."""

import torch
from counting import Family

from stepdistill.data.cache import Memory
from stepdistill.data.texts import Texts, encode_texts, store_texts
from stepdistill.show import Line

PROMPTS = ["aa", "b", "aa", "cccc"]


def test_equal_prompts_are_encoded_once_and_keep_their_places():
    family = Family()
    made = encode_texts(family, PROMPTS)
    assert family.asked == ["aa", "b", "cccc"]
    torch.testing.assert_close(made["text"].flatten() * 3, torch.tensor([2.0, 1, 2, 4]))
    assert made["mask"].flatten().tolist() == [False, False, False, True]


def test_a_store_gives_any_rows_in_the_network_s_dtype_and_the_null_prompt():
    family = Family()
    cond, null = store_texts(family, PROMPTS, Memory(), torch.bfloat16, Line())
    whole = encode_texts(Family(), PROMPTS)
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(cond["text"][rows], whole["text"].bfloat16()[rows])
    assert torch.equal(cond["mask"][rows], whole["mask"][rows])
    assert null["text"].shape == (1, 1) and null["text"].dtype == torch.bfloat16 and not null["mask"].any()
    assert sorted(family.asked) == ["", "aa", "b", "cccc"]


def test_prompts_encoded_beforehand_need_no_encoder():
    family = Family()
    texts, before = Texts(family, PROMPTS), len(family.asked)
    told = texts(["cccc", "b"])
    assert torch.equal(told["text"], encode_texts(Family(), ["cccc", "b"])["text"])
    assert texts.null["text"].shape == (1, 1) and len(family.asked) == before
    assert texts(["new", "b"])["text"].shape == (2, 1) and family.asked[before:] == ["new", "b"]
