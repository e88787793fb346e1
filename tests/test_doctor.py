"""What doctor says of machines and installations, each shown to its checks as they would be."""

from __future__ import annotations

import hashlib
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stepdistill import doctor
from stepdistill import surroundings as around
from stepdistill.surroundings import GIB, Finding


def known(**versions: str):
    """Versions of the packages that are installed; underscores for hyphens."""

    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    return version


def said(findings) -> dict[str, tuple[str, str]]:
    """subject -> level, text."""
    findings = [findings] if isinstance(findings, Finding) else list(findings)
    return {one.subject: (one.level, one.said) for one in findings}


def test_versions_are_held_against_the_requirements_of_the_package():
    asked = ["torch>=2.11", "diffusers", "peft", 'wandb; extra == "track"', 'lpips; extra == "lpips"', 'ruff; extra == "test"']
    asked += [
        'lpips; extra == "eval"',
        'torchao>=0.9; extra == "quantize"',
        'never; platform_system == "X" and extra == "track"',
    ]
    found = said(doctor.packages(asked, known(torch="2.10.1+cu128", diffusers="0.42.dev1", torchao="0.8"), (3, 12, 1)))
    assert found["python"] == ("ok", "3.12.1 (3.11 or newer is needed)") and found["diffusers"] == ("ok", "0.42.dev1")
    assert found["torch"] == ("fault", "2.10.1+cu128, but >=2.11 is needed; pip install 'torch>=2.11'")
    assert found["peft"] == ("fault", "missing; pip install 'peft'")
    assert found["wandb"] == ("note", "not installed, optional; curves at Weights & Biases: pip install 'stepdistill[track]'")
    assert found["lpips"][0] == "note" and "stepdistill[lpips]" in found["lpips"][1]
    assert found["torchao"][0] == "note" and "0.8, but >=0.9 is needed" in found["torchao"][1]
    assert not found.keys() & {"ruff", "never", "stepdistill"}
    assert said(doctor.packages([], known(), (3, 10, 9)))["python"][0] == "fault"
    assert said(doctor.packages(["torch>=2.11"], known(torch="2.13.0+cpu")))["torch"][0] == "ok"


def test_every_optional_package_has_a_purpose():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted = {
        text.split(";")[0]
        for extra, texts in project["optional-dependencies"].items()
        if extra not in doctor.FOR_DEVELOPERS
        for text in texts
    }
    assert wanted == doctor.PURPOSES.keys()


@pytest.mark.parametrize(
    ("lacking", "level", "words"),
    [
        ((), "ok", ["float32, bfloat16, float16"]),
        (("bfloat16",), "note", ["float32, float16; not bfloat16", "train.precision=no"]),
        (("bfloat16", "float16"), "note", ["train.precision=no model.dtype=float32"]),
        (("float32",), "fault", ["does not compute in float32", "pytorch.org"]),
    ],
)
def test_numbers_that_the_device_lacks(lacking, level, words):
    found = around.numbers(lambda where, dtype: str(dtype).removeprefix("torch.") in lacking)
    assert found.level == level and all(word in found.said for word in words), found


def test_this_machine_computes():
    assert around.numbers().level in ("ok", "note")


def test_compiler():
    assert around.compiler({"g++": "/bin/g++"}.get) == Finding("ok", "compiler", "/bin/g++, for train.compile")
    assert around.compiler({}.get).level == "note" and "install g++" in around.compiler({}.get).said


def test_kernels():
    def broken(name):
        raise RuntimeError("no driver\nmore")

    assert "reference" in around.kernels(False).said
    assert around.kernels(True, lambda name: None).said == "fused, by Triton"
    found = around.kernels(True, broken)
    assert found.level == "note" and "RuntimeError: no driver)" in found.said and "stepdistill[kernels]" in found.said


def pages(free: float, total: float):
    """A computer with so many GiB."""
    return {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": int(free * GIB) // 4096, "SC_PHYS_PAGES": int(total * GIB) // 4096}.get


def test_memory_is_that_of_the_container(tmp_path):
    limit = tmp_path / "memory.max"
    assert said(around.memory(pages(3, 8), (limit,))) == {"memory": ("ok", "8.0 GiB, 3.0 unused")}
    for text, level in (("max\n", "ok"), (f"{3 * GIB}\n", "note"), (f"{16 * GIB}\n", "ok"), (f"{5 * GIB}\n", "ok")):
        limit.write_text(text)
        found = said(around.memory(pages(3, 8), (limit,)))["memory"]
        assert found[0] == level, text
        assert ("this container may use" in found[1]) == (text[0] in "35")
    assert list(around.memory(None)) == []


def test_disks_name_the_remedy_of_each(tmp_path):
    cache = tmp_path / "not" / "there"
    free = {tmp_path: 1}
    here, hub = around.disks(tmp_path, cache, lambda place: SimpleNamespace(free=free[place] * GIB))
    assert (here.level, hub.level) == ("note", "note")
    assert "--output" in here.said and "HF_HOME" in hub.said and str(cache) in hub.said
    free[tmp_path] = 100
    assert {one.level for one in around.disks(tmp_path, cache, lambda place: SimpleNamespace(free=free[place] * GIB))} == {"ok"}


def test_shared_memory_and_open_files(tmp_path):
    usage = {"small": 64 * 2**20, "large": 8 * GIB}
    for name, size in usage.items():
        (found,) = around.shared_memory(tmp_path, lambda place, size=size: SimpleNamespace(total=size))
        assert (found.level == "note") == (name == "small") == ("--shm-size" in found.said)
    assert list(around.shared_memory(tmp_path / "none")) == []
    for limit, level in ((256, "note"), (1024, "ok"), (-1, "ok")):
        (found,) = around.open_files(limit)
        assert found.level == level and (level == "ok") != ("ulimit -n" in found.said)


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    assert around.runs_folder(tmp_path).level == "ok" and not any(tmp_path.iterdir())

    def refuse(dir):
        raise PermissionError(13, "Permission denied") if dir == tmp_path / "runs" else OSError

    monkeypatch.setattr(around.tempfile, "TemporaryFile", refuse)
    (tmp_path / "runs").mkdir()
    found = around.runs_folder(tmp_path)
    assert found.level == "fault" and "Permission denied" in found.said and "--output" in found.said


def test_the_hub_is_asked_once_unless_that_is_forbidden_and_the_token_is_not_shown():
    asked = []
    answers = said(around.hub({"HF_ENDPOINT": "https://mirror"}, lambda: "hf_secret", asked.append))
    assert asked == ["https://mirror"] and answers["hub"][0] == "ok" and "hf_secret" not in str(answers)
    assert answers["hub token"] == ("ok", "there is one")
    for value in ("1", "true", "on", "YES"):
        answers = said(around.hub({"HF_HUB_OFFLINE": value}, lambda: None, asked.append))
        assert answers["hub"][0] == "note" and "HF_HUB_OFFLINE" in answers["hub"][1] and "HF_TOKEN" in answers["hub token"][1]
    assert len(asked) == 1
    said(around.hub({"HF_HUB_OFFLINE": "0"}, lambda: None, asked.append))
    assert asked[1] == "https://huggingface.co"

    def silent(address):
        raise TimeoutError("timed out")

    answers = said(around.hub({}, lambda: None, silent))
    assert answers["hub"][0] == "note" and "does not answer (TimeoutError: timed out)" in answers["hub"][1]


def test_a_refusal_is_an_answer_and_no_server_is_none(tmp_path):
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Refuse(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(401)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        around.head(address)
        thread.join()
    assert asked == ["/"] or asked == [""]
    with pytest.raises(OSError):
        around.head(address)  # nobody is there any more
    with pytest.raises(OSError, match="no address"):
        around.head(f"file://{tmp_path}")


def test_processes():
    def dist(*names, there=True):
        calls = {f"is_{name}_available": lambda name=name: name in names for name in ("gloo", "nccl")}
        return SimpleNamespace(is_available=lambda: there, **calls)

    assert around.processes(1, dist("gloo", "nccl")).said == "can talk through nccl and gloo"
    assert around.processes(0, dist("gloo")).level == "ok"
    assert around.processes(2, dist("gloo")).level == "note" and "no NCCL" in around.processes(2, dist("gloo")).said
    assert around.processes(2, dist(there=False)).level == "note"


def test_a_clock_that_is_years_late():
    assert around.clock(now=2e9, made=1.9e9).level == "ok" and around.clock().level == "ok"
    found = around.clock(now=0, made=1.9e9)
    assert found.level == "note" and found.said.startswith("1970-01-01 00:00 UTC")


def test_faults_are_told_again_at_the_end_and_are_the_status(monkeypatch, capsys):
    def broken():
        yield Finding("ok", "before", "fine")
        raise ZeroDivisionError("unthought of")

    monkeypatch.setattr(doctor, "packages", broken)
    for name in ("device", "numbers", "compiler", "kernels", "processes", "disks", "hub"):
        monkeypatch.setattr(around, name, lambda: Finding("ok", "x", "y"))
    for name in ("torchvision", "pipelines"):
        monkeypatch.setattr(doctor, name, lambda: [])
    assert doctor.examine() == 1
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0] == "1 to mend:"
    assert "broken" in last[1] and "cannot be looked at (ZeroDivisionError: unthought of)" in last[1]
    monkeypatch.setattr(doctor, "packages", lambda: [])
    assert doctor.examine() == 0
    assert capsys.readouterr().out.endswith("all in order: stepdistill train quickstart\n")


def test_damage_is_found(tmp_path):
    (tmp_path / "good").write_text("good")
    (tmp_path / "bad").write_text("bad")
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("good", "bad", "gone")}
    (tmp_path / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    assert list(doctor.damaged(tmp_path)) == ["gone"]
    (tmp_path / "bad").write_text("worse")
    assert list(doctor.damaged(tmp_path)) == ["bad", "gone"]


def test_a_broken_torchvision_is_named(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    [finding] = doctor.torchvision()
    assert finding.level == "fault"
    assert "torchvision::nms does not exist" in finding.said
    assert "pip uninstall torchvision" in finding.said


def test_a_machine_of_gpus_lists_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda k: (k * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: f"card {k}")
    found = said(around.device())
    assert found["device 1"] == ("ok", "card 1, 1.0 of 24.0 GiB free") and "device 0" in found and "device" not in found
