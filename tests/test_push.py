"""`stepdistill push`: what is handed to the hub, with a hub that only notes it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from students import student

from stepdistill.errors import UserError
from stepdistill.export import write_export
from stepdistill.push import push
from stepdistill.sidecar import Serving, read_export


class Hub:
    """Notes what is done to it, and what the uploaded folder held."""

    def __init__(self, known=True):
        self.known, self.done, self.files = known, [], {}

    def whoami(self):
        if not self.known:
            raise RuntimeError("Token is required\nand more")
        return {"name": "me"}

    def create_repo(self, repo, **options):
        self.done.append((repo, options))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.done.append((repo_id, commit_message))
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        self.files = {file.relative_to(folder_path).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a model in a folder, exported; beside the export lies what is nobody's business."""
    folder = tmp_path_factory.mktemp("push")
    distillation = student(folder, "eps")
    write_export(distillation, folder / "run" / "export", ("diffusers", "fused"))
    (folder / "run" / "secret.txt").write_text("mine")
    return folder / "run"


def test_the_export_alone_is_uploaded_and_names_no_folder(run):
    api = Hub()
    assert push(run, "org/name", True, "org/base", api) == "https://huggingface.co/org/name"
    assert api.done == [("org/name", {"private": True, "exist_ok": True}), ("org/name", "tiny, by stepdistill")]
    there = {file.relative_to(run / "export").as_posix() for file in (run / "export").rglob("*") if file.is_file()}
    assert api.files.keys() == there and "secret.txt" not in api.files
    told = Serving.from_json(api.files["stepdistill.json"].decode())
    assert told.model == "org/base" and read_export(run / "export").model != "org/base"  # what lies here stays as it is
    card = api.files["README.md"].decode()
    assert 'base_model: "org/base"' in card and 'from_pretrained("org/base"' in card
    assert not [name for name, data in api.files.items() if str(run.parent).encode() in data]


def test_its_tensors_are_the_same(run, tmp_path):
    api = Hub()
    push(run, "org/name", base="org/base", api=api)
    file = "pytorch_lora_weights.safetensors"
    (tmp_path / file).write_bytes(api.files[file])
    with safe_open(tmp_path / file, "pt") as theirs, safe_open(run / "export" / file, "pt") as ours:
        assert set(theirs.keys()) == set(ours.keys())
        assert all(theirs.get_tensor(key).equal(ours.get_tensor(key)) for key in ours.keys())  # noqa: SIM118
        assert json.loads(theirs.metadata()["stepdistill.inference"])["model"] == "org/base"


@pytest.mark.parametrize(
    ("repo", "base", "known", "told"),
    [
        ("name", "org/base", True, "--repo name must be a name on the hub, as in org/name"),
        ("org/name", "/a/folder", True, "--base /a/folder must be a name on the hub"),
        ("org/name", None, True, "as its base model, which others have not; name it on the hub: --base org/name"),
        ("org/name", "org/base", False, r"\(Token is required\); log in: hf auth login"),
    ],
)
def test_what_is_refused_uploads_nothing(run, repo, base, known, told):
    api = Hub(known)
    with pytest.raises(UserError, match=told):
        push(run, repo, base=base, api=api)
    assert not api.done


def test_a_card_that_names_a_folder_is_refused(run, tmp_path):
    copy = shutil.copytree(run / "export", tmp_path / "export")
    (copy / "notes.md").write_text(f"made in {Path.home()}/there")
    api = Hub()
    with pytest.raises(UserError, match=r"notes.md names .*, a folder of this machine"):
        push(copy, "org/name", base="org/base", api=api)
    assert not api.done


def test_a_lora_of_this_machine_below_is_refused_unless_the_export_holds_it(tmp_path):
    distillation = student(tmp_path, "eps", "model.loras=[STYLE@0.5]")
    write_export(distillation, tmp_path / "a", ("diffusers",))
    write_export(distillation, tmp_path / "b", ("fused",))
    api = Hub()
    with pytest.raises(UserError, match=r"lies over .*style\.safetensors, which others have not.*--formats fused"):
        push(tmp_path / "a", "org/name", base="org/base", api=api)
    assert not api.done
    push(tmp_path / "b", "org/name", base="org/base", api=api)
    assert Serving.from_json(api.files["stepdistill.json"].decode()).loras == ()


def test_a_folder_without_an_export(tmp_path):
    with pytest.raises(UserError, match="neither a run folder nor an export"):
        push(tmp_path, "org/name", api=Hub())
