"""Executes the notebooks beside this file and writes them back with their outputs, free of what only this machine knows.

python notebooks/make.py                    # all
python notebooks/make.py quickstart         # one
STEPDISTILL_NOTEBOOK_STEPS=4 python notebooks/make.py --out FOLDER    # quickly, elsewhere
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
ORDER = ("quickstart", "use_a_distilled_lora", "write_a_strategy", "compare_strategies")  # the second uses the first's run
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PLACES = {str(HERE.parent): "stepdistill", sys.prefix: "python", tempfile.gettempdir(): "tmp", str(Path.home()): "~"}


def execute(source: Path, target: Path) -> None:
    """Run a notebook from a fresh kernel in its own folder, and write it to target.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; nothing is written.
    """
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(HERE)}})
    client.execute()
    clean(notebook)
    nbformat.write(notebook, target)


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave what a reader needs: no times, no versions, no messages of libraries, no paths of this machine."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {})
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output.metadata, output.data = nbformat.from_dict({}), nbformat.from_dict(lean(output.data))
            if output.output_type == "stream":
                output.text = without_noise(output.text)
                if not output.text:
                    continue
                if kept and kept[-1].output_type == "stream":  # errors and prints in the order in which they came
                    kept[-1].text += output.text
                    continue
                output.name = "stdout"
            kept.append(nbformat.from_dict(strip(output)))
        cell.outputs = kept


def lean(data: dict) -> dict:
    """An output's forms; of pictures one alone, with a palette of 256 colours."""
    if "image/png" not in data:
        return data
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as picture:
        file = io.BytesIO()
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": "a picture"}


def without_noise(text: str) -> str:
    """A stream's text without progress bars, empty lines and the warnings of libraries."""
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rsplit("\r", 1)[-1] for line in text.split("\n")]
    noise = re.compile(
        r"Warning|^W\d{4} |^Failed to load|^Unable to |it/s\]|\?it|^\s+warnings\.warn|tqdm|^No LoRA|^\[transformers\]"
    )
    return "".join(f"{line}\n" for line in lines if line.strip() and not noise.search(line))


def strip(value):
    """The same with every path of this machine replaced by a name."""
    if isinstance(value, dict):
        return {key: item if key.startswith("image/") else strip(item) for key, item in value.items()}  # pictures are text too
    if isinstance(value, list):
        return [strip(item) for item in value]
    if isinstance(value, str):
        for place, name in PLACES.items():
            value = value.replace(place, name)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=ORDER, metavar="NAME", help=f"some of {', '.join(ORDER)}")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="otherwise in place")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        began = time.monotonic()
        execute(HERE / f"{name}.ipynb", args.out / f"{name}.ipynb")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
