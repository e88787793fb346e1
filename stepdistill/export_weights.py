"""The weights of students, read back from the files of an export."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .errors import UserError
from .families.base import Family
from .families.load import told_of
from .foreign import read_tensors
from .lora_files import network_state
from .sidecar import WHOLE, Serving


def form_of(folder: Path, told: Serving) -> str:
    """Which of the export's formats (a key of `told.files`) its students are made of again; LoRA files of diffusers first.

    Raises:
        UserError: there are files in kohya's spelling alone, which leaves out what this needs.
    """
    for form in ("diffusers", *WHOLE):
        if form in told.files:
            return form
    raise UserError(
        f"{folder} holds {' and '.join(told.files)} files alone, of which no student is made again; export the run with "
        f"--formats diffusers, or give the run folder"
    )


def student_weights(folder: Path, told: Serving, form: str, family: Family) -> dict[str, dict[str, Tensor]]:
    """What each student learnt, or (of whole copies) all that it is: student -> name in `Denoiser.named_parameters` -> float32.

    family: of the base model, which knows the classes of its networks.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for k, (student, network) in enumerate(told.worn):
        if form == "diffusers":  # whatever the network, the keys begin with the pipeline's first
            state = network_state(read_tensors(folder / told.files[form][k]), told.network)
        else:  # the first student is in a whole pipeline, each who follows is a network
            place = folder / told.files[form][k] if told.take_turns and k else folder / told.files[form][0] / network
            with told_of(str(place)):
                net = type(getattr(family.pipe, network)).from_pretrained(place, use_safetensors=True, local_files_only=True)
            state = dict(net.named_parameters())
        inner = family.networks[network]
        found.setdefault(student, {}).update({inner + name: x.float() for name, x in state.items()})
    return found
