"""Folders of pictures as the programs of two benchmarks read them; those score them, with detectors that nobody needs here.

GenEval (Ghosh et al., arXiv:2310.11513) has a folder for each line of its list, DPG-Bench (Hu et al., ELLA, arXiv:2403.05135)
a grid for each of its prompt files. Both want four pictures of a prompt; those of prompt p have the noise of indices 4p to
4p + 3.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .. import __version__, distributed
from ..assemble import Distillation, restore
from ..data.texts import CHUNK, Texts
from ..errors import UserError
from ..files import put, write_text
from ..show import Line
from ..sources import suggestion
from .candidates import Candidate, student
from .walks import sampler

EACH = 4  # pictures of a prompt
ABOUT = "stepdistill.json"  # whose pictures a folder holds


class Entry(NamedTuple):
    """A prompt of a benchmark, and where its pictures go."""

    name: str  # of its folder or file
    prompt: str
    line: str = ""  # of the list that it came from, which the benchmark wants beside the pictures


class Layout(NamedTuple):
    """How a benchmark gives its prompts, and how it wants the pictures."""

    read: Callable[[Path], list[Entry]]
    write: Callable[[Path, Entry, np.ndarray], None]  # (folder or file to make, entry, uint8 [4, H, W, 3])
    square: bool  # it cuts pictures out of a grid by one number, their side


def read_geneval(path: Path) -> list[Entry]:
    """The lines of GenEval's evaluation_metadata.jsonl: JSON objects with a prompt, and what must be seen.

    Raises:
        UserError: the list cannot be read, is empty, or a line has no prompt.
    """
    found = []
    try:
        if not path.is_file():  # a pipe or a device would be read for ever
            raise FileNotFoundError("no such file")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read ({error}); give GenEval's evaluation_metadata.jsonl") from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError, RecursionError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f'{path}:{n} must be a JSON object with a text at "prompt", as in {{"tag": ..., "prompt": "a bench"}}'
            )
        found.append(Entry(f"{len(found):05d}", prompt, line))
    if not found:
        raise UserError(f"{path} holds no prompt; give GenEval's evaluation_metadata.jsonl, a JSON object a line")
    return found


def read_dpg(folder: Path) -> list[Entry]:
    """The prompts of a folder of text files, by name.

    Raises:
        UserError: it is no folder, holds no text files, or one that is empty, unreadable, or has a point in its name.
    """
    files = sorted(file for file in folder.glob("*.txt") if file.is_file()) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"--prompts {folder} is no folder of .txt files; give DPG-Bench's folder prompts, a file for each prompt"
        )
    found = []
    for file in files:
        try:
            prompt = file.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error}); give a prompt in UTF-8") from None
        if not prompt:
            raise UserError(f"{file} is empty; write its prompt, or take it out of the folder")
        if "." in file.stem:
            raise UserError(f"{file}: DPG-Bench reads a picture's name up to its first point; give it a name without points")
        found.append(Entry(f"{file.stem}.png", prompt))
    return found


def write_geneval(place: Path, entry: Entry, pictures: np.ndarray) -> None:
    """A folder with the line of the list, and samples/0000.png and on."""
    (place / "samples").mkdir(parents=True)
    (place / "metadata.jsonl").write_text(entry.line + "\n", encoding="utf-8")
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(place / "samples" / f"{k:04d}.png")


def write_dpg(place: Path, entry: Entry, pictures: np.ndarray) -> None:
    """One picture, of two rows of two, without gaps between them."""
    rows = [np.concatenate(list(pictures[k : k + 2]), axis=1) for k in (0, 2)]
    Image.fromarray(np.concatenate(rows)).save(place, format="PNG")


LAYOUTS = {"geneval": Layout(read_geneval, write_geneval, False), "dpg": Layout(read_dpg, write_dpg, True)}


def export_pictures(run: Path, name: str, prompts: Path, out: Path, steps: int | None = None, line: Line | None = None) -> Path:
    """Draw a benchmark's prompts with a run's student; again: go on where it was stopped. Returns out.

    With several processes each draws every n-th prompt. Noise depends on eval.seed, the prompt's place in the list and
    the picture's number alone.

    Args:
        name: a key of LAYOUTS.
        prompts: the benchmark's own list, or folder.
        steps: of the student; None: those it was made for.

    Raises:
        UserError: the benchmark is unknown, its prompts cannot be read, the student cannot be drawn so, or out holds something
            else.
    """
    if name not in LAYOUTS:
        raise UserError(f"--folder {name} is none{suggestion(name, LAYOUTS) or '; there are ' + ', '.join(LAYOUTS)}")
    layout, line = LAYOUTS[name], line or Line()
    entries = layout.read(prompts)
    distillation = restore(run)
    family = distillation.family
    if family.frames is not None:
        raise UserError(f"{run} makes videos, but --folder {name} is of pictures; give a run that draws pictures")
    if layout.square and family.size[0] != family.size[1]:
        raise UserError(
            f"{run} draws {family.size[1]}x{family.size[0]}, but --folder {name} needs pictures of equal sides; "
            f"train one at a square data.resolution"
        )
    drawn = student(distillation, steps)
    open_folder(out, about(distillation, name, entries, drawn))
    draw(distillation, drawn.walk, layout, entries, out, line)
    return out


def about(distillation: Distillation, name: str, entries: list[Entry], drawn: Candidate) -> dict[str, Any]:
    """What decides the pictures of a folder."""
    return {
        "layout": name,
        "prompts": hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16],
        "count": len(entries),
        "model": distillation.recipe.model.source,
        "steps": drawn.steps,
        "weights": drawn.weights,  # and how they are sampled
        "size": list(distillation.family.size),
        "seed": distillation.recipe.eval.seed,
    }


def open_folder(out: Path, wanted: dict[str, Any]) -> None:
    """Say in out what it is going to hold.

    Raises:
        UserError: it holds something else already.
    """
    file, wanted = out / ABOUT, json.loads(json.dumps(wanted))
    if file.is_file():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))["pictures"]
            other = [key for key in wanted if held.get(key) != wanted[key]]
        except (ValueError, KeyError, TypeError, AttributeError):
            other = ["what cannot be read"]
        if other:
            raise UserError(f"--out {out} holds pictures of other {', '.join(other)} (see its {ABOUT}); give another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists and holds no pictures of this command; give a new or an empty folder")
    distributed.wait()  # until every process has looked
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"pictures": wanted, "stepdistill": __version__}, indent=1))
    distributed.wait()


def draw(distillation: Distillation, walk, layout: Layout, entries: list[Entry], out: Path, line: Line) -> None:
    """This process's share of the prompts that out does not hold yet; each appears whole or not at all."""
    first, wanted = distributed.rank() == 0, distillation.recipe.eval
    mine = range(distributed.rank(), len(entries), distributed.world())
    left = [p for p in mine if not (out / entries[p].name).exists()]
    done = len(mine) - len(left)
    for some in chunks(left, CHUNK):
        texts = Texts(distillation.family, [entries[p].prompt for p in some])  # with large encoders not all fit at once
        pictures = sampler(distillation, walk, wanted.seed, wanted.batch, texts)
        for p in some:
            entry, part = entries[p], out / f".{entries[p].name}.tmp"
            shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
            layout.write(part, entry, pictures([entry.prompt] * EACH, EACH * p))
            put(part, out / entry.name)
            done += 1
            if first:
                line.report("prompts drawn", done, len(mine))
    distributed.wait()


def chunks(items: list[int], size: int) -> Iterator[list[int]]:
    """At most size of them at a time."""
    for i in range(0, len(items), size):
        yield items[i : i + size]
