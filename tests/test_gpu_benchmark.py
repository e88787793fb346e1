"""benchmarks/gpu without a GPU: the dry run takes the whole path, and its sums, errors and verdicts are right."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def gpu():
    """The script's modules, found as when it runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def dry(gpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    gpu.run.main(["--part", "attention", "--dry", "--out", str(folder), "--commit", "abc"])
    return folder


@pytest.fixture
def results(dry):
    return json.loads((dry / "attention_dry.json").read_text())


def test_it_needs_nothing_beyond_torch():
    named = {
        name.split(".")[0]
        for path in FOLDER.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    rest = named - sys.stdlib_module_names - set(NAMES)
    assert rest == {"torch", "PIL", "jvp_flash_attention"}  # the last two where they are
    told = subprocess.run([sys.executable, FOLDER / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert "--tune" in told.stdout


def test_a_dry_run_takes_the_whole_path_and_measures_nothing(gpu, dry, results, capsys):
    assert results["dry"] and sorted(path.name for path in dry.iterdir()) == ["attention_dry.json", "attention_dry.png"]
    assert list(results["rows"]) == [case.name for case in gpu.attention_cases.CASES]
    limits = {**gpu.attention_report.ERROR, "bfloat16": 5e-3}
    for row in results["rows"].values():
        made = row["providers"]["reference"]
        assert max(made["error_o"], made["error_to"], row["providers"]["math JVP"]["error_to"]) < limits[row["case"]["dtype"]]
        assert 0 < made["p10"] <= made["ms"] <= made["p90"] and made["share"] > 0 and row["tflop"] < 1e-3
        assert row["providers"]["flash forward"] == {"skipped": "needs a GPU"}
        assert ("ms" in row["providers"]["copy"]) == (row["case"]["queries"] != row["case"]["keys"])
    assert {target["verdict"] for target in results["targets"]} == {"not measured"} and len(results["targets"]) == 8
    assert results["runs"][0]["commit"] == "abc" and len(results["runs"][0]["matmul_tflops"]) == 2
    with Image.open(dry / "attention_dry.png") as picture:
        assert picture.width > 500 and len(picture.getcolors(1 << 20)) > 4

    (dry / "attention_dry.png").unlink()
    gpu.run.main(["--plot", str(dry / "attention_dry.json")])
    told = capsys.readouterr().out
    assert (dry / "attention_dry.png").is_file() and "which measures nothing" in told and "FLUX 1024px" in told


def test_the_same_code_goes_on_and_other_code_begins_anew(gpu, results, tmp_path, monkeypatch):
    path = tmp_path / "attention_dry.json"
    del results["rows"]["SDXL"], results["rows"]["causal"]
    results["rows"]["float16"]["kept"] = True
    path.write_text(json.dumps(results))
    gpu.attention.measure(gpu.measure.Host(), path, time.monotonic() + 60)
    held = json.loads(path.read_text())
    assert held["rows"].keys() == {case.name for case in gpu.attention_cases.CASES} and "kept" in held["rows"]["float16"]
    assert [held["rows"][name]["run"] for name in ("SDXL", "causal", "float16")] == [1, 1, 0] and len(held["runs"]) == 2

    monkeypatch.setattr(gpu.measure, "digest", lambda *folders: "other")
    gpu.attention.measure(gpu.measure.Host(), path, time.monotonic() - 1)
    held = json.loads(path.read_text())
    assert held["rows"] == {} and held["runs"][-1]["not_reached"] == [case.name for case in gpu.attention_cases.CASES]


def test_operations_and_bytes(gpu):
    case = replace(gpu.attention_cases.LARGE, tangents="111")
    counts = {tangents: replace(case, tangents=tangents).products for tangents in ("111", "110", "100", "001", "000")}
    assert counts == {"111": 6, "110": 5, "100": 4, "001": 3, "000": 2}
    assert case.tflop(6) == pytest.approx(12 * 24 * 4096**2 * 128 / 1e12)
    assert replace(case, causal=True).tflop(6) == pytest.approx(case.tflop(6) * 4097 / 8192)
    assert replace(case, batch=2, lens=(4096, 1024)).tflop(6) == pytest.approx(case.tflop(6) * 1.25)
    assert case.bytes == 8 * 24 * 4096 * 128 * 2  # q, k, v, their tangents, o, to
    text = replace(case, keys=77, tangents="100", dtype="float32")
    assert text.bytes == (4 * 4096 + 2 * 77) * 24 * 128 * 4


@pytest.mark.parametrize(
    "change", [{}, {"causal": True}, {"kv_heads": 2}, {"lens": (17, 5), "batch": 2}, {"tokens_first": True}]
)
def test_errors_are_seen_where_they_are_looked_for(gpu, change):
    cases = gpu.attention_cases
    case = replace(cases.LARGE.toy(), dtype="float32", **change)
    x = cases.draw(case, torch.device("cpu"))
    attention = gpu.measure.kernels().attention_jvp
    *given, lens = x
    o, to = attention(*given, key_lens=lens, causal=case.causal, enable_gqa=case.kv != case.heads)
    want = cases.truth(case, x, attention)
    assert want.error(o, "o") < 1e-6 and want.error(to, "to") < 1e-6
    assert want.error(1.01 * to, "to") == pytest.approx(0.01, rel=1e-3) and want.error(o, "to") > 0.1
    to[0, -1, -1, -1] = torch.nan
    assert want.error(to, "to") is None


def test_what_is_not_finite_is_no_number(gpu):
    cases, host = gpu.attention_cases, gpu.measure.Host()
    case = cases.LARGE.toy()
    x = cases.draw(case, host.device)
    want = cases.truth(case, x, gpu.measure.kernels().attention_jvp)
    made = cases.trial(host, lambda: (torch.full_like(x.q, torch.nan), torch.full_like(x.q, torch.inf)), x, want)
    assert made["error_o"] is made["error_to"] is None


def test_works_take_turns_and_slow_ones_less_often(gpu):
    host, calls = gpu.measure.Host(), []
    host.least, host.most, host.seconds = 2, 10, 0.01
    found = gpu.measure.take_turns(
        host, {"quick": lambda: calls.append("q"), "slow": lambda: (calls.append("s"), time.sleep(0.02))}
    )
    assert found["quick"]["reps"] == 10 and found["slow"]["reps"] == 2 and found["slow"]["ms"] > found["quick"]["ms"]
    assert "".join(calls[6:]) == "qqqqqsqqqqqs"  # after three calls each that settle how many


def test_reasons(gpu, monkeypatch):
    cases, providers = gpu.attention_cases.CASES, gpu.attention_providers
    on = SimpleNamespace(dry=False, free=lambda: int(139e9))
    who = {provider.name: provider for provider in providers.providers(on)}

    def served(name):
        return {case.name for case in cases if who[name].why_not(case, on) is None}

    assert served("kernel") == served("cuDNN forward") | {"float32"} == {case.name for case in cases}
    assert served("flash forward") == served("kernel") - {"float32", "padded keys"}
    assert served("copy") == {case.name for case in cases if "text" in case.name}
    wan = next(case for case in cases if case.name == "Wan 480p")
    assert who["math JVP"].why_not(wan, on) == "needs about 280 GB where 139 GB are free"
    assert wan.name not in served("math JVP, 16 bit")
    assert {"SDXL", "FLUX 1024px", "4096 tokens, D 128", "float32"} <= served("math JVP")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert served("jvp-flash-attention") == set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    full = {"SDXL", "FLUX 1024px", wan.name, *(f"{n} tokens, D {d}" for n in (1024, 4096, 16384) for d in (64, 128))}
    assert served("jvp-flash-attention") == full | {"common direction", "tokens before heads", "causal", "float16", "float32"}
    assert served("jvp-flash-attention, pointers") == {"4096 tokens, D 128"}


def test_what_a_provider_raises_is_its_answer(gpu, monkeypatch):
    def fail():
        raise RuntimeError("no such\nproduct")

    provider = gpu.attention_providers.Provider("kernel", lambda case, x: fail, lambda case, on: None)
    monkeypatch.setattr(gpu.attention, "providers", lambda on: (provider,))
    made = gpu.attention.row(gpu.measure.Host(), gpu.attention_cases.LARGE.toy(), 1.0)
    assert made["providers"] == {"kernel": {"skipped": "RuntimeError: no such product"}}
    assert "no such product" in gpu.attention_report.lines("row", made)[1]


@pytest.fixture
def figures(gpu, results):
    """Rows as a GPU might give them, all targets just met."""
    rows, by_name = results["rows"], {case.name: case for case in gpu.attention_cases.CASES}
    for name, row in rows.items():
        case = by_name[name]
        row["case"] = json.loads(json.dumps(vars(case)))
        share = {64: 0.58, 72: 0.4, 128: 0.65}[case.dim]
        kernel = {"ms": 8.0 if case.tangents == "100" else 10.0, "share": share, "error_o": 1e-6, "error_to": 9e-6}
        row["providers"] = {"kernel": kernel, "flash forward": {"ms": 10 / 2.6}, "math JVP": {"ms": 50.0}}
        row["providers"] |= {"math JVP, 16 bit": {"ms": 35.0}, "jvp-flash-attention": {"ms": 40.0}}
        if case.cross:
            kernel["copies"] = 1.6
    return rows


def verdicts(gpu, rows):
    return [target["verdict"] for target in gpu.attention_report.targets({"rows": rows})]


@pytest.mark.parametrize(
    ("row", "who", "figure", "value", "missed"),
    [
        ("causal", "kernel", "error_to", 1.1e-2, {0}),
        ("common direction", "kernel", "error_to", None, {0}),
        ("float32", "kernel", "error_o", 2e-5, {0}),
        ("16384 tokens, D 128", "kernel", "share", 0.64, {1}),
        ("SDXL", "kernel", "share", 0.57, {2}),
        ("FLUX 1024px", "flash forward", "ms", 3.8, {3}),
        ("4096 tokens, D 72, constant k v", "kernel", "ms", 8.1, {4}),
        ("Wan 480p, 77 text tokens", "kernel", "copies", 1.7, {5}),
        ("4096 tokens, D 64", "jvp-flash-attention", "ms", 39.0, {6}),
        ("4096 tokens, D 64", "math JVP, 16 bit", "ms", 34.0, {7}),
        ("1024 tokens, D 128", "kernel", "share", 0.1, set()),  # too short to count
        ("FLUX 1024px", "kernel", "error_to", 1.1e-2, {0, 1, 3, 6, 7}),  # a wrong result is no speed
    ],
)
def test_the_worst_row_decides(gpu, figures, row, who, figure, value, missed):
    assert verdicts(gpu, figures) == ["met"] * 8
    worse = copy.deepcopy(figures)
    worse[row]["providers"][who][figure] = value
    assert {k for k, verdict in enumerate(verdicts(gpu, worse)) if verdict == "missed"} == missed


def test_a_row_without_a_result_misses_and_one_without_a_rival_is_not_measured(gpu, figures):
    failed = copy.deepcopy(figures)
    failed["Wan 480p"]["providers"]["kernel"] = {"skipped": "OutOfResources"}
    found = gpu.attention_report.targets({"rows": failed})
    assert found[1]["verdict"] == "missed" and "no result or a wrong one in 'Wan 480p'" in found[1]["told"]
    for row in figures.values():
        row["providers"]["jvp-flash-attention"] = {"skipped": "not installed"}
    assert verdicts(gpu, figures)[6] == "not measured"
    del figures["16384 tokens, D 64"]  # what its constant k and v are compared with
    figures["16384 tokens, D 64, constant k v"]["providers"]["kernel"]["ms"] = 99.0
    assert verdicts(gpu, figures)[4] == "met"


def test_tiles_that_fail_or_are_wrong_do_not_win(gpu, tmp_path, monkeypatch):
    tuning, right = gpu.attention_tune, gpu.attention_tune.stand_in

    def compute(tile, case, x):
        if tile == (64, 32, 2, 4):
            raise RuntimeError("out of shared memory")
        o, to = right(tile, case, x)
        return (o, 2 * to) if tile == (64, 32, 2, 8) else (o, to)

    monkeypatch.setattr(tuning, "stand_in", compute)
    monkeypatch.setattr(tuning, "VARIANTS", tuning.VARIANTS[:2])
    path = tmp_path / "attention_tiles_dry.json"
    tuning.tune(gpu.measure.Host(), path, time.monotonic() + 60)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["D 128", "D 128, constant k v"]
    for row in rows.values():
        assert row["tiles"]["64x32x2x4"] == {"skipped": "RuntimeError: out of shared memory"}
        assert row["tiles"]["64x32x2x8"]["skipped"] == "wrong" and "ms" not in row["tiles"]["64x32x2x8"]
        assert row["best"] == min((k for k in row["tiles"] if "ms" in row["tiles"][k]), key=lambda k: row["tiles"][k]["ms"])


def test_tiles_that_cannot_fit_are_not_tried(gpu):
    large = gpu.attention_cases.LARGE
    found = gpu.attention_tune.tiles(large)
    assert (128, 64, 2, 8) in found and (128, 32, 3, 8) in found  # 192 and 160 KB, no spills
    assert (128, 64, 3, 8) not in found and (128, 128, 2, 8) not in found and (128, 64, 2, 4) not in found
    assert (128, 128, 2, 8) in gpu.attention_tune.tiles(replace(large, dim=64))
    assert (128, 64, 3, 8) in gpu.attention_tune.tiles(replace(large, tangents="100"))
