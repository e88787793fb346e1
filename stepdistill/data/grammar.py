"""The prompts of `stepdistill/prompts`: sentences of the grammar in grammar.txt, always the same ones in the same order."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("grammar.txt")
SEED = 6
WORDS = range(3, 41)  # numbers of words that a prompt may have
AN = re.compile(r"\ba(?= (?!uni|use|uk|eu|one\b)[aeiou])", re.IGNORECASE)  # where "a" becomes "an"
SMALL = {  # words that may come again
    "a", "an", "the", "of", "to", "in", "on", "at", "with", "and", "from", "into", "over", "under", "that",
}  # fmt: skip


def sentences() -> Iterator[str]:
    """Prompts without end, each another one: prompt i does not depend on how many are taken."""
    rules, chance, told = read_grammar(FILE.read_text(encoding="utf-8")), random.Random(SEED), set()
    while True:
        text = AN.sub("an", expand(rules, "prompt", chance))
        if text not in told and len(text.split()) in WORDS and not repeats(text):
            told.add(text)
            yield text


def repeats(text: str) -> bool:
    """Whether a word that means something stands in it twice, as in "a red cube next to a red ball"."""
    words = [word for word in re.findall(r"[\w-]+", text.lower()) if word not in SMALL]
    return len(set(words)) < len(words)


def expand(rules: dict[str, list[str]], name: str, chance: random.Random) -> str:
    """One sentence of a rule."""
    options = rules[name]
    text = options[chance.randrange(len(options))]
    return re.sub(r"\{([^}]+)\}", lambda found: expand(rules, found[1], chance), text)


@cache
def read_grammar(text: str) -> dict[str, list[str]]:
    """Rule to its options, each as often as it is likely."""
    rules: dict[str, list[str]] = {}
    for line in map(str.strip, text.splitlines()):
        if head := re.fullmatch(r"\[(.+)\]", line):
            options = rules.setdefault(head[1], [])
        elif line and not line.startswith("#"):
            times, option = re.fullmatch(r"(?:(\d+)x )?(.+)", line).groups()
            options += [option] * int(times or 1)
    return rules
