"""The cache at its full size, with the tiny models."""

import pytest
from counting import Watched, check_interrupted

from stepdistill.families.load import load_family


@pytest.mark.long
def test_ten_thousand_prompts_and_two_thousand_pictures_interrupted_at_three_places(tmp_path):
    inner = load_family("stepdistill/tiny-sd")
    check_interrupted(tmp_path, 10_000, 2_000, (600, 400, 700), lambda stop: Watched(inner, stop))
