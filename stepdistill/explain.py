"""What a strategy says of itself, as text for a terminal: its docstring, and what its recipe can set.

The docstring begins with what the strategy does. Paragraphs that begin with one of HEADINGS and a colon open a section; all
that follows belongs to it. Indented paragraphs, the maths, are kept line by line; "- " at a line's start opens an item.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator

from .fields import described, fields_of
from .strategies import Strategy
from .yaml_tree import shown

HEADINGS = ("Objective", "When to choose it", "Healthy curves")
WHAT = "What it does"
ALWAYS = "Each player also logs lr, its learning rate, and grad_norm, its gradient's norm before that is clipped to optim.clip."
ROLES = {  # a role or module -> what it is; student_1 counts as student
    "teacher": "the network of model.source, frozen: what is imitated",
    "student": "what is sampled in the end",
    "fake": "the fake score: learns to denoise what the student makes, and so tells how likely that is",
    "target": "a running average of the student, which the student's target comes from",
    "errors": "a small network that learns how large errors are at a noise level, and so how to weigh them",
    "head": "the discriminator: tells the student's samples from pictures, or from what they should be",
}
NEEDS = {  # what data must fill -> the recipe's key for it, and what it is
    "prompts": ("data.prompts", "a text file with a prompt a line"),
    "x0": ("data.images", "pictures with captions, which training reads in place of the prompts"),
    "pairs": ("pairs", "noise and what the teacher makes of it, made before training or by: stepdistill pairs RECIPE"),
}


def explanation(name: str, kind: type[Strategy], width: int) -> str:
    """All there is to say of a strategy, in lines of at most `width` characters, except where its maths is longer."""
    one, told = kind(), sections(inspect.getdoc(kind) or "")
    title, _, paper = (inspect.getdoc(sys.modules[kind.__module__]) or kind.__name__).split("\n")[0].partition(". ")
    blocks = [f"{name}: {title.removesuffix('.')}" + f"\n{paper}" * bool(paper)]
    if "Healthy curves" in told:
        told["Healthy curves"].append(ALWAYS)
    for heading, paragraphs in told.items():
        blocks += [heading, *(laid_out(text, width) for text in paragraphs)]
    blocks += ["Roles, with the defaults below", table(roles(one), width)]
    blocks += ["Data, with the defaults below", table(data(one), width)]
    blocks += [f"Keys of strategy: {{name: {name}, ...}}, with their defaults", table(keys(kind), width)]
    return "\n\n".join(blocks)


def sections(doc: str) -> dict[str, list[str]]:
    """A docstring's paragraphs by heading, in the order of the docstring."""
    heading, found = WHAT, {WHAT: []}
    for paragraph in re.split(r"\n\s*\n", doc.strip("\n")):
        if opening := re.match(rf"({'|'.join(HEADINGS)}):\s+", paragraph):
            heading, found[opening[1]] = opening[1], []
            paragraph = re.sub(r"\A[a-z]+(?=[ ,:\n])", lambda word: word[0].capitalize(), paragraph[opening.end() :])
        found[heading].append(paragraph)
    return found


def laid_out(paragraph: str, width: int) -> str:
    """A paragraph, indented by two: as it is if it is maths, otherwise its items wrapped."""
    if paragraph.startswith(" "):
        return textwrap.indent(textwrap.dedent(paragraph), "      ")
    items = re.split(r"\n(?=- )", paragraph)
    return "\n".join(wrapped(item, width, "  ", "    " if item.startswith("- ") else "  ") for item in items)


def roles(one: Strategy) -> Iterator[tuple[str, str]]:
    """Each role and module, and what it is and who trains it, in which stages."""
    stages = [one.players(stage) for stage in range(one.stages)]
    trained = [name for players in stages for names in players.values() for name in names]
    for name in dict.fromkeys(["teacher", *one.roles, *trained]):
        yield name, ROLES.get(name) or ROLES.get(name.split("_")[0], "of this strategy alone; see above")
        for who in dict.fromkeys(who for players in stages for who, names in players.items() if name in names):
            when = [str(k + 1) for k, players in enumerate(stages) if name in players.get(who, ())]
            only = f" in stage {', '.join(when)}" if len(when) < len(stages) else ""
            yield "", f"(player {who}{only}: optim.{'student' if who == 'student' else 'critic'}_lr)"


def data(one: Strategy) -> Iterator[tuple[str, str]]:
    """The keys of what the strategy is fed, and what that is."""
    yield from (NEEDS.get(name, (name, "")) for name in ("prompts", *sorted(one.needs)))


def keys(kind: type) -> Iterator[tuple[str, str, str]]:
    """Each field's name, default and meaning, and below that its rule."""
    for spec in fields_of(kind).values():
        yield spec.name, shown(spec.default), spec.comment
        yield "", "", f"({described(spec.type)}{f', {spec.range}' if spec.range else ''})"


def table(rows: Iterable[tuple[str, ...]], width: int) -> str:
    """Rows of texts in columns, of which the last is wrapped."""
    rows = list(rows)
    *sizes, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for *cells, text in rows:
        head = "  " + "".join(f"{cell:<{size}}  " for cell, size in zip(cells, sizes, strict=True))
        lines.append(wrapped(text, width, head, " " * len(head)))
    return "\n".join(lines)


def wrapped(text: str, width: int, first: str, rest: str) -> str:
    """One paragraph in lines, of which the first and the rest begin so."""
    lines = textwrap.wrap(" ".join(text.split()), width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return "\n".join(lines) or first.rstrip()
