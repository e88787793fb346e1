"""A recipe file in order, and what `load_recipe` complains of when it is changed. The fixture `root` has what it names."""

import pytest

from stepdistill.recipe import RecipeError, load_recipe

GOOD = """\
model:
  source: {root}/teacher
lora:
  rank: 16
strategy:
  name: lcm
  guidance: [2.0, 6.0]
data:
  prompts: {root}/prompts.txt
  images: {root}/pictures
optim:
  student_lr: 5e-5
train:
  steps: 300
  batch: 32
eval:
  every: 0
"""


def write(root, text=GOOD):
    """The text as root/my.yaml; braces are for str.format."""
    (root / "my.yaml").write_text(text.format(root=root))
    return root / "my.yaml"


def problems(file, *overrides):
    """What load_recipe complains of."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def only(file, *overrides):
    found = problems(file, *overrides)
    assert len(found) == 1, found
    return found[0]


def swapped(old, new):
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)
