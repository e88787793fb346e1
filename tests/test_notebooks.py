"""Notebooks are pages that were executed: whole, in order, without errors, with their pictures; and they still run."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / "notebooks"
NAMES = ("quickstart", "use_a_distilled_lora", "write_a_strategy", "compare_strategies")
SMALL = {"STEPDISTILL_NOTEBOOK_STEPS": "4", "STEPDISTILL_NOTEBOOK_PICTURES": "0"}


def read(name: str, folder: Path = FOLDER) -> nbformat.NotebookNode:
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source(cell: nbformat.NotebookNode) -> str:
    """A cell's Python: without the line that writes it into a file."""
    return re.sub(r"\A%%writefile .*\n", "", cell.source)


def pictures(notebook: nbformat.NotebookNode) -> list[Image.Image]:
    found = [
        output.data["image/png"] for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_every_notebook_is_known():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)
    assert not [path for path in FOLDER.iterdir() if path.suffix not in (".ipynb", ".py") and path.is_file()]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_was_executed_in_order_without_errors_and_shows_pictures(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert pictures(notebook) and all(len(picture.getcolors(1 << 24)) > 16 for picture in pictures(notebook))  # none is blank
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_tells_nothing_of_the_machine_and_is_small(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(?:work|tmp|root|home|Users|usr|opt)/|execution_started|iopub|\\u001b", words)
    assert len(text) < 600_000


@pytest.mark.parametrize("name", NAMES)
def test_a_notebooks_code_compiles_and_its_imports_and_links_exist(name):
    notebook = read(name)
    written = set(re.findall(r"%%writefile \S*/(\w+)\.py", "\n".join(cell.source for cell in code(notebook))))
    trees = [ast.parse(source(cell)) for cell in code(notebook)]
    for node in (node for tree in trees for node in ast.walk(tree)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(module in written or importlib.util.find_spec(module) for module in modules), modules
    for link in re.findall(
        r"\]\(((?!https?:)[^)#]+)\)", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    ):
        assert (FOLDER / link).is_file(), link


def test_the_lora_is_loaded_without_stepdistill():
    trees = [ast.parse(source(cell)) for cell in code(read("use_a_distilled_lora"))]
    names = {node.module for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "diffusers" in names and not [name for name in names if name.startswith("stepdistill")]


def test_the_strategy_of_the_notebook_meets_its_closed_form(tmp_path, monkeypatch):
    """Its own cells, up to the check; the student's one step is the product of the teacher's eight."""
    monkeypatch.setenv("STEPDISTILL_NOTEBOOK_RUNS", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    said: dict[str, object] = {"print": lambda *_words: None}
    for cell in code(read("write_a_strategy")):
        if "closed-form" not in cell.metadata.get("tags", []):
            continue
        if cell.source.startswith("%%writefile"):
            (tmp_path / "progressive.py").write_text(source(cell))
        else:
            exec(compile(source(cell), "cell", "exec"), said)
    sys.modules.pop("progressive")
    assert float((said["made"] - said["product"]).abs().max()) < 1e-6 and 0.5 < said["product"] < said["C"]


@pytest.fixture(scope="module")
def made():
    """notebooks/make.py as a module."""
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_written_is_clean(made):
    assert set(made.ORDER) == set(NAMES)
    file = io.BytesIO()
    Image.radial_gradient("L").convert("RGB").save(file, "png")
    forms = {"image/png": base64.b64encode(file.getvalue()).decode(), "image/jpeg": "x", "text/plain": "<PIL.Image at 0x7f>"}
    stream = nbformat.v4.new_output
    cell = nbformat.v4.new_code_cell("1", execution_count=1, metadata={"execution": {"x": "today"}, "tags": ["a"]})
    cell.outputs = [
        stream("stream", name="stdout", text=f"saved {REPO}/runs/x\n"),
        stream("stream", name="stderr", text="\x1b[A\n 10%|#  | 1/9 [00:01<00:08, 1.0it/s]\rdone\n  FutureWarning: gone\n"),
        stream("display_data", data=forms),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"language_info": {"name": "python", "version": "3.11"}})
    made.clean(notebook)
    nbformat.validate(notebook)
    text, picture = notebook.cells[0].outputs
    assert text.text == "saved stepdistill/runs/x\ndone\n" and notebook.cells[0].metadata == {"tags": ["a"]}
    assert set(picture.data) == {"image/png", "text/plain"} and "0x" not in picture.data["text/plain"]
    with Image.open(io.BytesIO(base64.b64decode(picture.data["image/png"]))) as read_back:
        assert read_back.size == (256, 256) and read_back.mode == "P"
    assert "version" not in notebook.metadata.language_info


@pytest.mark.long
def test_all_notebooks_run_from_start_to_end(tmp_path):
    environment = os.environ | SMALL | {"STEPDISTILL_NOTEBOOK_RUNS": str(tmp_path / "runs")}
    before = {path: path.stat().st_mtime_ns for path in FOLDER.iterdir()}
    command = [sys.executable, str(FOLDER / "make.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in NAMES:
        assert pictures(read(name, tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.name != "__pycache__"}.items() <= before.items()
