"""Strategies of other packages: refused before they are imported unless trusted, refused with a remedy if they cannot serve;
and the contract that docs/write_a_strategy.md states is the one that holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from students import student
from written import only, problems, swapped, write

import stepdistill
from stepdistill import load_pipeline, load_recipe
from stepdistill.assemble import restore
from stepdistill.cli import main
from stepdistill.data import build_batches
from stepdistill.errors import UserError
from stepdistill.export import write_export
from stepdistill.recipe import dump_recipe
from stepdistill.sidecar import read_export
from stepdistill.strategies import STRATEGIES, Strategy
from stepdistill.strategy_names import find_strategy, strategy_name
from stepdistill.trainer import Trainer

DOCUMENT = Path(stepdistill.__file__).parent.parent / "docs" / "write_a_strategy.md"
NAME = "mypackage.method:Endpoint"
BAD = {  # modules of the package that cannot serve
    "broken": "import torch.nothing_of_that_name",
    "fails": "raise OSError('no such device\\nin two lines')",
    "other": "class NoStrategy: pass\nNUMBER = 3",
    "bare": "from stepdistill.strategies import Strategy\nclass Bare(Strategy):\n    rate: float = 1.0",
    "half": "from dataclasses import dataclass\nfrom stepdistill.strategies import Strategy\n"
    "@dataclass\nclass Half(Strategy):\n    def losses(self, roles, batch, draw): ...\n"
    "@dataclass\nclass Required(Strategy):\n    rate: float\n"
    "@dataclass\nclass Named(Strategy):\n    name: str = ''",
}


def example() -> str:
    """The strategy that the document shows."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    return code


@pytest.fixture
def package(tmp_path, monkeypatch):
    """mypackage can be imported, and is forgotten afterwards."""
    folder = tmp_path / "site" / "mypackage"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for name, code in (BAD | {"method": example()}).items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        del sys.modules[name]


def test_the_documents_strategy_is_trained_exported_and_loaded_back(tmp_path, package):
    overrides = ("trust_remote_code=true", "data.count=4", "train.batch=2", "train.steps=2", "optim.student_lr=1e-2")
    made = student(tmp_path, "eps", *overrides, strategy=f"{{name: {NAME}, solver_steps: 2}}")
    trainer = Trainer(made, build_batches(made.recipe, made.family))
    first, second = trainer.step(), trainer.step()
    assert first["student/regression"] != second["student/regression"]
    trainer.save(tmp_path / "run" / "checkpoints")

    again = restore(tmp_path / "run")
    weights = again.tensors()
    assert again.recipe == made.recipe
    assert again.strategy.solver_steps == 2
    assert all(weights[name].equal(x) for name, x in made.tensors().items())
    assert "the trainer's latents" in write_export(again, tmp_path / "run" / "export", ["diffusers"])
    assert read_export(tmp_path / "run" / "export").strategy == NAME
    assert load_pipeline(tmp_path / "run").get_active_adapters()


def test_the_document_speaks_of_the_whole_contract():
    members = [name for name in vars(Strategy) if not name.startswith("_")]
    table = re.findall(r"^\| `(\w+)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert table == members


def test_a_recipe_writes_the_name_back(root, package):
    text = swapped("name: lcm\n  guidance: [2.0, 6.0]", f"name: {NAME}\n  guidance: 2") + "trust_remote_code: true\n"
    recipe = load_recipe(write(root, text))
    dumped = dump_recipe(recipe)
    assert dumped.startswith("name: my\ntrust_remote_code: true\nmodel:\n")
    assert f"strategy:\n  name: {NAME}\n  solver_steps: 8\n" in dumped
    (root / "again.yaml").write_text(dumped)
    assert load_recipe(root / "again.yaml") == recipe
    said = only(root / "again.yaml", "strategy.solver_step=3")
    assert f"did you mean 'solver_steps'? (see: stepdistill explain {NAME} --trust-remote-code)" in said


def test_what_is_not_trusted_is_not_imported(root, package, capsys):
    file = write(root, swapped("name: lcm\n  guidance: [2.0, 6.0]", f"name: {NAME}"))
    for overrides in ([], ["trust_remote_code=false"]):
        text = only(file, *overrides)
        assert text.startswith(f"{file}:6  strategy.name: {NAME} is code of another package")
        assert "set trust_remote_code: true" in text
    [_, wrong] = problems(file, "trust_remote_code=1")
    assert wrong.startswith("command line  trust_remote_code: 1 must be true or false")
    assert main(["explain", NAME]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not [name for name in sys.modules if name.startswith("mypackage")]
    assert load_recipe(file, ["trust_remote_code=true"]).trust_remote_code
    assert main(["explain", NAME, "--trust-remote-code"]) == 0
    assert "solver_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nopackage.method:Endpoint", "there is no module nopackage; install its package"),
        ("mypackage.methods:Endpoint", "there is no module mypackage.methods; install its package"),
        ("mypackage.broken:Endpoint", "importing mypackage.broken fails with ModuleNotFoundError: No module named 'torch.n"),
        ("mypackage.fails:Endpoint", "fails with OSError: no such device; to see where: python -c 'import mypackage.fails'"),
        ("mypackage.method:Endpiont", "module mypackage.method has no Endpiont; did you mean 'Endpoint'?"),
        ("mypackage.method:Zzz", "has no Zzz; name a class of that module"),
        ("mypackage.other:NoStrategy", "is no strategy: it must be a class derived from stepdistill.strategies.Strategy"),
        ("mypackage.other:NUMBER", "is no strategy: it must be a class derived"),
        ("mypackage.bare:Bare", "is no strategy: its fields are not declared; decorate it with @dataclass"),
        ("mypackage.half:Half", "is no strategy: it has no method inference; define one"),
        ("mypackage.half:Required", "is no strategy: its field rate has no default; give it one"),
        ("mypackage.half:Named", "is no strategy: its field name is the key that names the strategy; rename it"),
        ("mypackage.method:", "must read package.module:Class"),
        ("../mypackage:Endpoint", "must read package.module:Class"),
    ],
)
def test_what_cannot_serve_is_told_with_a_remedy(root, package, name, said):
    file = write(root, swapped("name: lcm\n  guidance: [2.0, 6.0]", f"name: '{name}'") + "trust_remote_code: true\n")
    text = only(file)
    assert text.startswith(f"{file}:6  strategy.name: {name}")
    assert said in text
    assert "\n" not in text


def test_one_class_has_one_name(package):
    for name, kind in STRATEGIES.items():
        assert find_strategy(name, trusted=False) is kind
        assert strategy_name(kind()) == name
    ours = find_strategy("stepdistill.strategies.dmd2:DMD2", trusted=True)
    assert strategy_name(ours()) == "dmd2"
    assert strategy_name(find_strategy(NAME, trusted=True)()) == NAME
    with pytest.raises(UserError, match="unknown strategy mypackage"):
        find_strategy("mypackage", trusted=True)
