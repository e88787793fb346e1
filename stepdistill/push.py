"""`stepdistill push`: an export and its card to the hub, when asked, and nothing else of this machine. The only user of
huggingface_hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from .errors import UserError
from .export import write_card
from .sidecar import SIDECAR, WHOLE, Serving, find_export, read_export
from .sources import is_hub_id

HEADER = "stepdistill.inference"  # where a LoRA file of diffusers' spelling repeats the sidecar
LOADED_FROM = "_name_or_path"  # where diffusers and transformers note it in a config


def push(run: Path, repo: str, private: bool = False, base: str | None = None, api: Any = None) -> str:
    """Upload the export of a run or export folder; returns the address of what is there then.

    Args:
        repo: org/name on the hub; made if it is not there.
        base: the hub id of the base model, where the student was distilled from a folder.
        api: a huggingface_hub.HfApi; None: one for the token of this machine.

    Raises:
        UserError: no export, a name that is none, nobody is logged in, or the export names folders of this machine.
    """
    for option, name in (("--repo", repo), ("--base", base)):
        if name is not None and not (is_hub_id(name) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)):
            raise UserError(f"{option} {name} must be a name on the hub, as in org/name")
    folder = find_export(run)
    here = told = read_export(folder)
    if base is not None:
        told = replace(told, model=base, revision=None, variant=None)
    if all(form in WHOLE for form in told.files):
        told = replace(told, loras=())  # a whole pipeline holds them
    if local := next(local_paths(told), None):
        raise UserError(local)
    if link := next((file for file in sorted(folder.rglob("*")) if file.is_symlink()), None):
        raise UserError(f"nothing is uploaded: {link} is a link to {link.readlink()}; put the file itself there, or remove it")
    api = api or hub()
    check_login(api)
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "export"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".*"))
        rewrite(copy, told, folder.parent)
        if found := next(leaks(copy, here), None):
            raise UserError(f"nothing is uploaded: {found}, a folder of this machine; rename the run, or mend the file")
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(copy), commit_message=f"{told.name}, by stepdistill")
    return f"https://huggingface.co/{repo}"


def local_paths(told: Serving) -> Iterator[str]:
    """What an export says that is true on this machine alone, and what to do about it."""
    if not is_hub_id(told.model):
        yield f"the export names {told.model} as its base model, which others have not; name it on the hub: --base org/name"
    for lora in told.loras:
        if lora.path is not None:
            yield (
                f"the export lies over {lora}, which others have not; upload that LoRA and train with model.loras: [org/name], "
                f"or push what holds it: stepdistill export RUN --formats fused --out DIR"
            )


def hub() -> Any:
    """The hub's interface, with the token of this machine.

    Raises:
        UserError: the package is not there.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("stepdistill push needs huggingface_hub: pip install huggingface_hub") from None
    return HfApi()


def check_login(api: Any) -> None:
    """Raises UserError where the hub knows nobody by this machine's token."""
    try:
        api.whoami()
    except Exception as error:  # no token, a wrong one, or no way to the hub: each library version has its own classes for them
        why = without_token(next(iter(str(error).strip().splitlines()), type(error).__name__))
        raise UserError(
            f"the hub knows nobody by the token of this machine ({why[:200]}); log in: hf auth login, or set HF_TOKEN to a "
            f"token with write access"
        ) from None


def without_token(text: str) -> str:
    """Text without the token of this machine."""
    from huggingface_hub import get_token

    token = get_token()
    return text.replace(token, "(token)") if token else text


def rewrite(copy: Path, told: Serving, run: Path) -> None:
    """Let sidecar, card and file headers of a copied export say `told`, and no config say where it was loaded from."""
    (copy / SIDECAR).write_text(told.to_json(), encoding="utf-8")
    for file in copy.rglob("*.safetensors"):
        header = header_of(file)
        if HEADER in header:
            with safe_open(file, "pt") as opened:
                state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no mapping
            save_file(state, file, header | {HEADER: told.to_json()})
    for file in copy.rglob("*.json"):
        tree = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.pop(LOADED_FROM, None) is not None:
            file.write_text(json.dumps(tree, indent=2), encoding="utf-8")
    write_card(copy, run)


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def leaks(copy: Path, here: Serving) -> Iterator[str]:
    """The files of an export that name a folder of this machine: somebody's home, or what the export says `here`."""
    places = {str(Path.home()), str(Path.cwd()), here.base, *(lora.place for lora in here.loras)}
    places = {place for place in places if Path(place).is_absolute() and place != "/"}
    for file in sorted(file for file in copy.rglob("*") if file.is_file()):
        text = ""
        if file.suffix in (".md", ".json", ".txt"):
            text = file.read_text(encoding="utf-8")
        elif file.suffix == ".safetensors":
            text = json.dumps(header_of(file))
        yield from (f"{file.relative_to(copy)} names {place}" for place in sorted(places) if place in text)
