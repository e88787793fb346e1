"""Nothing is asked of a network but by a hub id, a push or a metric's name; no temporary file has a name to guess."""

import ast
import os
import re
import socket
import sys
from contextlib import suppress
from pathlib import Path

import processes
import pytest

import stepdistill
from stepdistill.cli import main
from stepdistill.families.load import load_pipeline_folder
from stepdistill.recipe import load_recipe
from stepdistill.runs import train
from stepdistill.serve import sample_run

SMALL = ("data.count=4", "train.batch=2", "train.steps=1", "eval.every=0", "eval.n=0", "eval.steps=[1]", "eval.prompts=[a]")


def without_network(folder: str) -> None:
    """Train, export, report and sample the embedded teacher where every way out is noted and closed, and the hub is not said to
    be out of reach."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    for module in list(sys.modules.values()):
        if getattr(module, "HF_HUB_OFFLINE", None) is True:
            module.HF_HUB_OFFLINE = False
    asked, plain = [], socket.socket.connect

    def refuse(*where, **_options):
        asked.append(where)
        raise OSError("no network here")

    def connect(self, place):
        return plain(self, place) if self.family == socket.AF_UNIX else refuse(place)

    socket.socket.connect = connect
    socket.getaddrinfo = socket.create_connection = socket.socket.connect_ex = socket.socket.sendto = refuse
    with suppress(Exception):
        load_pipeline_folder("org/name")
    assert asked, "a hub id must have asked for the hub, or this test notices nothing"
    asked.clear()
    os.chdir(folder)
    for teacher in ("tiny-sd", "tiny-sd3"):
        load_pipeline_folder(f"stepdistill/{teacher}")
    run = train(load_recipe("quickstart", SMALL))
    assert (run.folder / "report.html").is_file() and sample_run(run.folder, "a cat").is_file()
    assert not asked, asked


def test_training_export_report_and_sampling_ask_nothing_of_a_network(tmp_path):
    process = processes.start(without_network, str(tmp_path))
    process.join(240)
    assert process.exitcode == 0


def test_the_command_line_turns_telemetry_off(monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert main(["ls", "strategies"]) == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")  # somebody's own wish stays
    assert main(["ls", "strategies"]) == 0 and os.environ["HF_HUB_DISABLE_TELEMETRY"] == "0"


SOURCES = sorted(Path(stepdistill.__file__).parent.rglob("*.py"))


def calls(text: str) -> list[str]:
    """Calls that trust a file, or run what a text says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            bad = re.fullmatch(
                r"eval|exec|os\.(system|popen)|(pickle|marshal|joblib)\.loads?|tempfile\.mktemp|.*\.extractall", name
            )
            bad = bad or (name in ("torch.load",) and given.get("weights_only") != "True")
            bad = bad or (name == "np.load" and given.get("allow_pickle", "False") != "False")
            bad = bad or (name in ("yaml.load", "yaml.full_load", "yaml.unsafe_load")) or given.get("shell") == "True"
            bad = bad or given.get("trust_remote_code") == "True"
            found += [ast.unparse(node)] * bool(bad)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/tmp"):
            found.append(node.value)
    return found


def test_no_source_trusts_a_file_runs_a_text_or_guesses_a_temporary_name():
    assert {str(path): found for path in SOURCES if (found := calls(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "text",
    [
        *(
            "torch.load(a)",
            "np.load(a, allow_pickle=True)",
            "yaml.load(a, Loader)",
            "pickle.load(f)",
            "eval(a)",
            "x = '/tmp/a'",
        ),
        *("tempfile.mktemp()", "subprocess.run(a, shell=True)", "tar.extractall(a)", "f(trust_remote_code=True)"),
    ],
)
def test_such_a_call_is_found(text):
    assert calls(text)
