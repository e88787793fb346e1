"""Families that count what they are asked to encode, and may be interrupted."""

import io
from contextlib import suppress

import torch

from stepdistill.data.cache import Cache, Memory
from stepdistill.data.drawings import drawings
from stepdistill.data.pictures import store_pictures
from stepdistill.data.prompts import read_prompts
from stepdistill.data.texts import store_texts
from stepdistill.show import Line


class Family:
    size, frames = (16, 16), None

    def __init__(self, stop_after=None):
        self.asked, self.seen, self.stop_after = [], [], stop_after

    def interrupt(self, calls):
        if self.stop_after is not None and calls >= self.stop_after:
            raise KeyboardInterrupt

    def encode_prompts(self, prompts):
        self.interrupt(len(self.asked))
        self.asked += prompts
        lengths = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return {"text": lengths / 3, "mask": lengths > 2}

    def null_prompts(self):
        self.asked.append("")
        return {"text": torch.zeros(1, 1), "mask": torch.zeros(1, 1, dtype=torch.bool)}

    def encode(self, images):
        self.interrupt(len(self.seen))
        latents = images.mean((2, 3))
        self.seen += latents.tolist()
        return latents


class Watched(Family):
    """A real family, watched."""

    def __init__(self, inner, stop_after=None):
        super().__init__(stop_after)
        self.inner, self.size, self.null_prompts = inner, inner.size, inner.null_prompts

    def encode_prompts(self, prompts):
        super().encode_prompts(prompts)
        return self.inner.encode_prompts(prompts)

    def encode(self, images):
        super().encode(images)
        return self.inner.encode(images)


def line():
    return Line(io.StringIO())


def opened(folder, what="texts", **settings):
    return Cache(folder, what, settings, line())


def whole_and_broken(folder, prompts, found, stops, make):
    """Encode all at once in memory, and on disk with interruptions after `stops` of each; what was encoded on disk."""
    done = []
    family = make(None)
    plain, null = store_texts(family, prompts, Memory(), torch.float32, line())
    captions, latents = store_pictures(family, [family.size], found, Memory(), "here", line())
    for stop in (*stops, None):
        family = make(stop)
        with suppress(KeyboardInterrupt):
            cond, none = store_texts(family, prompts, opened(folder), torch.float32, line())
        with suppress(KeyboardInterrupt):
            told, x0 = store_pictures(family, [family.size], found, opened(folder, "pictures"), "here", line())
        done.append((list(family.asked), list(family.seen)))
    rows = torch.arange(len(prompts))
    assert all(torch.equal(cond[name][rows], plain[name][rows]) for name in plain)
    assert all(torch.equal(none[name], null[name]) for name in null)
    rows = torch.arange(len(found))
    assert torch.equal(x0[rows], latents[rows]) and told == captions
    return done


def check_interrupted(folder, n, m, stops, make):
    """n prompts and m pictures; each is encoded once, however often that was interrupted."""
    prompts = read_prompts("stepdistill/prompts", n)
    done = whole_and_broken(folder, prompts, list(drawings(m)), stops, make)
    asked = [prompt for some, _ in done for prompt in some if prompt]
    assert sorted(asked) == sorted(prompts)
    assert sum(len(seen) for _, seen in done) == m
    assert all(0 < len(some) < n and 0 < len(seen) < m for some, seen in done)  # each stop came in between
