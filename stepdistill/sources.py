"""Where models, prompts and pictures come from: finds what a recipe names, and what is wrong with it.

A source is an embedded name (whatever begins with `stepdistill/`), a file or folder, or, for models, a hub id
(`org/name`), which only diffusers resolves. Nothing here opens weights or pictures, and nothing imports more than the
standard library. Each check has `there`: whether what is named must exist already; if not, only its form is checked.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from .architectures import find
from .foreign import is_plain, read_json, shorten

TINY = Path(__file__).parent / "tiny"  # the embedded world: teachers are folders of it
EMBEDDED = "stepdistill/"
EMBEDDED_DATA = "stepdistill/tiny"
EMBEDDED_PROMPTS = "stepdistill/prompts"  # of a grammar of everyday English
PROMPTS = (".txt", ".jsonl", ".csv", ".parquet")  # files of prompts
CAPTIONS = ("prompt", "caption", "text")  # keys and columns that hold them
METADATA = "metadata.jsonl"  # in a folder of pictures: lines with a file_name and a caption
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
PICKLED = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})
LOOK = 10**4  # characters of a file, and files of a folder, that a check looks at
PAIRS = "pairs.json"  # in a folder of teacher pairs: with what settings they were made, and how many
MOST, MOST_FILES = 10**9, 10**5  # pairs that a folder may hold, and files
PYARROW = "Parquet and Arrow files are read by pyarrow, which is not installed: pip install 'stepdistill[data]'"
PICKLE = (
    "is a pickled weight file, and unpickling runs whatever code it holds; save the model as safetensors "
    "(pipeline.save_pretrained(folder, safe_serialization=True))"
)


def embedded_models(folder: Path = TINY) -> dict[str, Path]:
    """The teachers inside the package: name to pipeline folder."""
    return {f"{EMBEDDED}{index.parent.name}": index.parent for index in sorted(folder.glob("*/model_index.json"))}


def is_hub_id(source: str) -> bool:
    """Whether a model source has the form org/name and is neither an embedded name nor an existing path."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and Path(source).suffix not in {".safetensors", *PICKLED}
    return bool(named) and not source.startswith(EMBEDDED) and not Path(source).exists()


def identity(source: str) -> str:
    """A model source that means the same from every folder: paths become absolute."""
    return str(Path(source).resolve()) if source not in embedded_models() and Path(source).is_dir() else source


def suggestion(word: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?` where a known word is near, else an empty text."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def pipeline_class(source: str) -> str | None:
    """The pipeline that an embedded model, a folder or a known hub id holds; None where that cannot be told from here."""
    if is_hub_id(source):
        architecture = find(source)
        return architecture and architecture.pipeline
    try:
        name = read_json(embedded_models().get(source, Path(source)) / "model_index.json")["_class_name"]
        return name if isinstance(name, str) and name.isidentifier() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check_model(source: str, variant: str | None = None, families: Collection[str] = (), there: bool = True) -> Iterator[str]:
    """What is wrong with a model source. `families`: the pipeline classes that have a family; others that diffusers has are
    found out as they are loaded. Empty: not checked."""
    if is_hub_id(source):
        return
    known = embedded_models()
    folder = known.get(source, Path(source))
    if source.startswith(EMBEDDED) and source not in known:
        have = ", ".join(known) or "none (reinstall stepdistill)"
        yield f"{source} is no embedded model{suggestion(source, known) or f'; there are: {have}'}"
    elif folder.suffix.lower() in PICKLED and not folder.is_dir():
        yield f"{source} {PICKLE}"
    elif not folder.exists():
        if not there:
            return
        near = suggestion(f"{EMBEDDED}{source}", known)
        near = near or "; give a pipeline folder or a hub id org/name"
        yield f"{source} does not exist (seen from {Path.cwd()}){near}"
    elif not folder.is_dir():
        yield f"{source} is a file, but a pipeline is a folder; convert it once: from_single_file, then save_pretrained"
    elif not (folder / "model_index.json").is_file():
        yield (
            f"{source} is not a pipeline: it has no model_index.json; "
            "give the folder that pipeline.save_pretrained(folder) wrote"
        )
    else:
        yield from _check_pipeline(folder, source, variant, families)


def _check_pipeline(folder: Path, source: str, variant: str | None, families: Collection[str]) -> Iterator[str]:
    """What is wrong with a folder that has a model_index.json."""
    try:
        parts = pipeline_parts(folder)
    except (OSError, ValueError):
        yield f"{source}/model_index.json cannot be read; save the pipeline again"
        return
    name = pipeline_class(source)
    if families and name and name not in families and not in_diffusers(name):
        yield f"{source} holds a {name}, which the installed diffusers lacks; well known are {', '.join(sorted(families))}"
    for part in parts:
        if not (folder / part).is_dir():
            yield f"{source} lacks its folder {part}, which model_index.json names; copy the whole pipeline"
            continue
        files = sorted((folder / part).iterdir())
        safe = [file.name for file in files if file.suffix == ".safetensors"]
        for file in files:
            if file.suffix.lower() in PICKLED and not safe:
                yield f"{source}/{part}/{file.name} {PICKLE}"
        if variant and safe and not any(f".{variant}." in name for name in safe):
            have = ", ".join(safe)
            yield f"{source}/{part} has no weights of the variant {variant}, only {have}; leave model.variant out"


def pipeline_parts(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts that a pipeline folder has: name -> library and class, as its model_index.json says.

    Raises:
        OSError, ValueError: it has no such file, or a damaged one.
    """
    index = read_json(folder / "model_index.json")
    if not isinstance(index, dict):
        raise ValueError("it is no object")
    listed = {
        name: value for name, value in index.items() if isinstance(value, list) and name[:1] != "_" and value != [None, None]
    }
    for name, value in listed.items():
        if not is_plain(name) or len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise ValueError(f"{shorten(name)} must be the name of a library and of a class in it")
    return {name: tuple(value) for name, value in listed.items()}


def foreign_code(folder: Path) -> Iterator[str]:
    """What of a pipeline folder is code that it brings itself, or that neither diffusers nor transformers has.

    Raises:
        OSError, ValueError: as `pipeline_parts`.
    """
    parts = pipeline_parts(folder)
    if pipeline_class(str(folder)) is None:
        yield "a pipeline class of its own"
    package = importlib.util.find_spec("diffusers")
    within = Path(package.origin).parent / "pipelines"  # some parts are named after the folder that their class is in
    for name, (library, kind) in parts.items():
        if library not in ("diffusers", "transformers") and not (is_plain(library) and (within / library).is_dir()):
            yield f"{name}, a class {shorten(kind)} of {shorten(library)}"
        elif not kind.isidentifier():
            yield f"{name}, {shorten(kind)}"
        elif kind.startswith("Auto") and any("auto_map" in read_json(file) for file in (folder / name).glob("*config.json")):
            yield f"{name}, a {kind} whose configuration names code of its own"


def in_diffusers(name: str) -> bool:
    """Whether the installed diffusers has a class of that name; it is not imported."""
    package = importlib.util.find_spec("diffusers")
    return bool(name) and package is not None and f'"{name}"' in Path(package.origin).read_text(encoding="utf-8")


def check_prompts(source: str, there: bool = True) -> Iterator[str]:
    """What is wrong with a prompt source: a file, the grammar's prompts, or the embedded world."""
    path, kinds, known = Path(source), f"a file of prompts ({', '.join(PROMPTS)})", (EMBEDDED_PROMPTS, EMBEDDED_DATA)
    if source in known:
        return
    if source.startswith(EMBEDDED):
        near = suggestion(source, known) or f"; there are {' and '.join(known)}"
        yield f"{source} is no source of prompts{near}"
    elif path.is_dir():
        yield f"{source} is a folder; give {kinds}, or {EMBEDDED_PROMPTS}"
    elif path.suffix.lower() not in PROMPTS:
        yield f"{source} is not {kinds}; name one, or {EMBEDDED_PROMPTS}"
    elif there and not path.exists():
        yield _missing(source, kinds, EMBEDDED_PROMPTS)
    elif path.exists() and not path.is_file():
        yield f"{source} is a device or a pipe; give {kinds}"
    elif path.exists() and path.suffix.lower() == ".parquet":
        if importlib.util.find_spec("pyarrow") is None:
            yield f"{source}: {PYARROW}"
    elif path.exists():
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(LOOK)
        except UnicodeDecodeError:
            yield f"{source} is not text in UTF-8; give {kinds}"
            return
        if not text.strip() and len(text) < LOOK:
            yield f"{source} is empty; write one prompt a line"


def check_images(source: str, there: bool = True) -> Iterator[str]:
    """What is wrong with a picture source: the embedded world, or a folder of captioned pictures of some kind."""
    folder, wanted = Path(source), "a folder of pictures with captions"
    if source == EMBEDDED_DATA:
        return
    if source.startswith(EMBEDDED):
        yield f"{source} holds no pictures{suggestion(source, [EMBEDDED_DATA]) or f'; there is {EMBEDDED_DATA}'}"
    elif folder.is_file():
        yield f"{source} is a file; give the folder that it is in"
    elif not folder.is_dir():
        if there:
            yield _missing(source, wanted, EMBEDDED_DATA)
    else:
        files = list(islice(folder.rglob("*"), LOOK))
        kinds = {file.suffix.lower() for file in files}
        if len(files) == LOOK:  # what is further on, nobody waits for: it is told when it is read
            return
        if not kinds & {*PICTURES, ".tar", ".parquet", ".arrow"}:
            have = ", ".join(sorted(PICTURES))
            yield (
                f"{source} holds no pictures; put {have} files there, each with a .txt caption beside it, or named with its "
                f"text in {METADATA}; or .tar shards of such; or .parquet or saved tables of `datasets`"
            )
        elif not kinds & {*PICTURES, ".tar"} and importlib.util.find_spec("pyarrow") is None:
            yield f"{source}: {PYARROW}"


def check_folder(source: str) -> Iterator[str]:
    """What keeps a folder from being made, or used, where it is named."""
    place = Path(source)
    there = next(one for one in (place, *place.parents) if os.path.lexists(one) or one == Path(one.anchor))
    if os.path.lexists(there) and not there.is_dir():
        yield f"{source}: {there} is no folder; name another place"


def check_pairs(source: str, model: Mapping[str, Any], there: bool = True) -> Iterator[str]:
    """What is wrong with a folder of teacher pairs. model: whose they must be, its source, revision, variant and LoRAs."""
    folder, make = Path(source), "stepdistill pairs RECIPE"
    if not (folder / PAIRS).is_file():
        if there:
            yield f"{source} holds no teacher pairs: it has no {PAIRS} (seen from {Path.cwd()}); make them: {make}"
        return
    try:
        made = {"loras": None} | read_json(folder / PAIRS)
        missing = [name for name in shards(made) if not (folder / name).is_file()]
        theirs = {key: made[key] for key in model}
    except (OSError, ValueError, KeyError, TypeError):
        yield f"{source}/{PAIRS} cannot be read; make the pairs in another folder: {make} --out DIR"
        return
    wanted = {**model, "source": identity(model["source"] or "")}
    if other := [f"{key} {theirs[key]}, not {wanted[key]}" for key in model if theirs[key] != wanted[key]]:
        yield f"{source} holds pairs of another teacher ({', '.join(other)}); make this one's: {make} --out DIR"
    if missing and there:
        yield f"{source} lacks {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}; complete it: {make}"


def shards(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the files that hold the pairs of a manifest. Raises ValueError: its numbers cannot be."""
    for key in ("count", "shard"):
        if not isinstance(manifest[key], int) or not 0 < manifest[key] <= MOST:
            raise ValueError(f"{key} {shorten(manifest[key])} must be a whole number from 1 to {MOST}")
    if manifest["count"] > MOST_FILES * manifest["shard"]:
        raise ValueError(f"{manifest['count']} pairs in files of {manifest['shard']} are more than {MOST_FILES} files")
    return [f"pairs-{k:05d}.safetensors" for k in range(-(-manifest["count"] // manifest["shard"]))]


def _missing(source: str, wanted: str, embedded: str) -> str:
    """The message for data that is not there; embedded: what the package has instead."""
    near = suggestion(source, [embedded])
    return f"{source} does not exist (seen from {Path.cwd()}){near or f'; give {wanted}, or {embedded}'}"
