"""What trackers are told of a run, that they cannot end one, and that nobody is asked for a password."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image
from students import student
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepdistill import extras
from stepdistill.errors import UserError
from stepdistill.machine import check_machine
from stepdistill.recipe import load_recipe
from stepdistill.runs import train
from stepdistill.show import Line
from stepdistill.strategies import LCM
from stepdistill.trackers import Trackers, tracking

QUICK = (
    "data.count=8",
    "train.batch=4",
    "train.steps=3",
    "train.save_every=2",
    "eval.every=2",
    "eval.n=0",
    "eval.watch=0",
    "eval.steps=[1]",
)
QUICK += ("eval.prompts=[a large red circle]",)
BOTH = "train.trackers=[tensorboard, wandb]"
ROWS = [
    {"who": "student", "steps": 2, "fd": 3.5, "alignment": 0.9, "diversity": None, "solver": "", "tried": {}},
    {"who": "teacher", "steps": 2, "fd": 9.0},
]


class StandIn(types.ModuleType):
    """As much of wandb as accelerate calls; `runs` holds what each `init` was given and what was logged after."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs, self.config, self.url = [], types.SimpleNamespace(update=self.update), "https://api.wandb.ai"

    def init(self, **given):
        run = types.SimpleNamespace(given=given, logged=[], finished=0, told={})
        run.log = lambda values, step: run.logged.append((step, values))
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        self.runs.append(run)
        return run

    def update(self, values, allow_val_change):
        self.runs[-1].told = values

    def Image(self, picture):
        return "image", picture.shape

    def setup(self):
        return types.SimpleNamespace(settings=types.SimpleNamespace(base_url=self.url))


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", made)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return made


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    student(folder)
    return folder / "run" / "recipe.yaml"


def recipe(file, *overrides):
    return load_recipe(file, (*QUICK, *overrides))


def events(folder) -> EventAccumulator:
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return read.Reload()


def test_a_run_and_its_resumption_are_one_curve(recipe_file, wandb, monkeypatch, tmp_path):
    """The run is killed after a step that no checkpoint holds: it is done again, and counts once."""
    monkeypatch.chdir(tmp_path)
    honest = LCM.losses

    def losses(self, roles, batch, draw):
        if draw.step == 3:
            raise OSError("power cut")
        yield from honest(self, roles, batch, draw)

    monkeypatch.setattr(LCM, "losses", losses)
    with pytest.raises(OSError, match="power cut"):
        train(recipe(recipe_file, BOTH, "train.steps=4"))
    monkeypatch.setattr(LCM, "losses", honest)
    run = train(recipe(recipe_file, BOTH, "train.steps=4"))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    read = events(run.folder)
    for name in ("student/consistency", "student/grad_norm", "student/lr"):
        assert [(e.step, e.value) for e in read.Scalars(name)] == [
            (line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines
        ]
    assert [e.step for e in read.Images("samples")] == [0, 2, 4]
    with Image.open(run.folder / "samples" / "000004.png") as grid:
        assert (read.Images("samples")[-1].width, read.Images("samples")[-1].height) == grid.size
    assert "rank: 4" in read.Tensors("recipe/text_summary")[-1].tensor_proto.string_val[0].decode()

    first, second = wandb.runs
    assert first.given == second.given and first.given["mode"] == "offline" and first.given["settings"]["silent"]
    assert first.given["dir"] == str(run.folder) and first.given["name"] == "tiny" and first.finished == second.finished == 1
    assert first.told["lora"]["rank"] == 4 and second.told["train"]["steps"] == 4
    assert [step for step, values in second.logged if "student/grad_norm" in values] == [3, 4]
    (step, samples) = next((step, values["samples"]) for step, values in second.logged if "samples" in values)
    assert (step, samples[0][0], samples[0][1][2]) == (4, "image", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and (run.folder / "wandb").is_dir()


def test_the_students_figures_are_told(recipe_file, wandb, tmp_path):
    with tracking(recipe(recipe_file, BOTH), tmp_path, 3, Line()) as trackers:
        trackers.figures(ROWS, 3)
        trackers.figures([], 3)
    assert wandb.runs[0].logged == [(3, {"eval/2steps/fd": 3.5, "eval/2steps/alignment": 0.9})]
    assert events(tmp_path).Scalars("eval/2steps/fd")[0].value == 3.5


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_switched_off(recipe_file, wandb, tmp_path, capsys, broken):
    def fail(*_args, **_keys):
        raise OSError("disk full\nmore")

    honest = wandb.init
    if broken == "init":
        wandb.init = fail
    else:
        wandb.init = lambda **given: types.SimpleNamespace(**vars(honest(**given)) | {broken: fail})
    with tracking(recipe(recipe_file, BOTH), tmp_path, 0, Line()) as trackers:
        for step in (1, 2):
            trackers.log({"student/loss": 1.0}, step)
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    (line,) = said
    assert "switched off" in line and "OSError: disk full" in line and "more" not in line
    assert [e.step for e in events(tmp_path).Scalars("student/loss")] == [1, 2]  # the other one goes on


def test_the_user_stops_a_run_also_inside_a_tracker(recipe_file, wandb, tmp_path):
    def stop(**_given):
        raise KeyboardInterrupt

    wandb.init = stop
    with pytest.raises(KeyboardInterrupt):
        Trackers(recipe(recipe_file, BOTH), tmp_path, 0, Line())


def test_null_is_tensorboard_where_it_is_installed_and_none_is_nobody(recipe_file, tmp_path, monkeypatch):
    assert list(Trackers(recipe(recipe_file), tmp_path / "a", 0, Line()).working) == ["tensorboard"]
    assert not Trackers(recipe(recipe_file, "train.trackers=[]"), tmp_path / "b", 0, Line()).working
    monkeypatch.setattr("stepdistill.trackers.installed", lambda _name: False)
    assert not Trackers(recipe(recipe_file), tmp_path / "b", 0, Line()).working and not (tmp_path / "b").exists()


def test_only_the_first_process_tells(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("stepdistill.distributed.rank", lambda: 1)
    assert not Trackers(recipe(recipe_file), tmp_path / "b", 0, Line()).working and not (tmp_path / "b").exists()


def test_a_named_tracker_must_be_installed(recipe_file, monkeypatch):
    monkeypatch.setattr(extras, "installed", lambda name: name != "wandb")
    with pytest.raises(UserError, match=r"train\.trackers wandb needs the package wandb.*pip install 'stepdistill\[track\]'"):
        check_machine(recipe(recipe_file, BOTH))


def test_online_without_a_key_is_refused_and_nobody_is_asked(recipe_file, wandb, monkeypatch, tmp_path):
    wanted = recipe(recipe_file, BOTH)
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        check_machine(wanted)
    monkeypatch.setenv("WANDB_MODE", "online")
    check_machine(recipe(recipe_file))  # which does not name it
    with pytest.raises(UserError, match=r"WANDB_MODE is online.*wandb login.*WANDB_API_KEY"):
        check_machine(wanted)
    (tmp_path / "netrc").write_text("machine elsewhere login user password 0\n")
    with pytest.raises(UserError, match="no key"):
        check_machine(wanted)
    (tmp_path / "netrc").write_text("machine my.host:8080 login user password 0\n")
    wandb.url = "http://my.host:8080"
    check_machine(wanted)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0")
    check_machine(wanted)
    with tracking(wanted, tmp_path / "online", 0, Line()):
        assert wandb.runs[-1].given["mode"] == "online" and wandb.runs[-1].given["resume"] == "allow"


def test_pictures_arrive_as_they_are(recipe_file, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "grid.png")
    with tracking(recipe(recipe_file), tmp_path, 0, Line()) as trackers:
        trackers.grid(tmp_path / "grid.png", 5)
    (event,) = events(tmp_path).Images("samples")
    (tmp_path / "read.png").write_bytes(event.encoded_image_string)
    assert event.step == 5 and np.array_equal(np.asarray(Image.open(tmp_path / "read.png")), picture)
