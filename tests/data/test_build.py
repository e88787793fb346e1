"""Prompts and pictures as they are read and encoded."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.data.build import captioned, encode_pictures, encode_texts, fit, quiet


class Family:
    """Counts what it is asked to encode."""

    def __init__(self):
        self.asked = []

    def encode_prompts(self, prompts):
        self.asked += prompts
        return {"text": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    def encode(self, images):
        return images.mean((2, 3))


def test_captioned_pictures_of_a_folder(tmp_path):
    for name, colour in (("b", "blue"), ("a", "red")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"all {colour}\n")
    captions, chunks = captioned(str(tmp_path), None, (16, 16))
    assert captions == ["all red", "all blue"]
    (pictures,) = chunks
    assert pictures.shape == (2, 16, 16, 3) and pictures[0, 0, 0].tolist() == [255, 0, 0]
    latents = encode_pictures(Family(), iter([pictures]), 2, quiet)
    torch.testing.assert_close(latents, torch.tensor([[1.0, -1, -1], [-1, -1, 1]]))


def test_drawings_come_at_the_wanted_side_and_do_not_depend_on_their_number():
    captions, chunks = captioned("stepdistill/tiny", 70, (32, 32))
    pictures = np.concatenate(list(chunks))
    assert pictures.shape == (70, 32, 32, 3) and len(captions) == 70
    fewer, chunks = captioned("stepdistill/tiny", 3, (32, 32))
    assert fewer == captions[:3]
    np.testing.assert_array_equal(next(chunks), pictures[:3])


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (37, 91), (16, 16)])
def test_fit_keeps_the_centre(size):
    picture = Image.new("RGB", size, "white")
    assert fit(picture, (16, 24)).shape == (16, 24, 3)
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    assert (fit(wide, (16, 16)) == 255).all()


def test_equal_prompts_are_encoded_once_and_keep_their_places():
    family = Family()
    made = encode_texts(family, ["aa", "b", "aa", "cccc"], chunk=2)
    assert family.asked == ["aa", "b", "cccc"]
    assert made["text"].flatten().tolist() == [2, 1, 2, 4]
