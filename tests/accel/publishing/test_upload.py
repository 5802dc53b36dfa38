"""A bundle on the hub: what is sent, what is not, and who else reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import yaml

import accel
from accel import UserError
from accel.bundle import Bundle
from accel.command_line.parser import Parser
from accel.commands import export
from accel.publishing.upload import prepared

ROOT = Path(__file__).parents[3]
MODEL, REPO = "digits/4step-int8", "someone/digits"


def cloned(hub, folder):
    """Every file of the repository, as `hf download` puts them into a folder."""
    for name, file in hub.repos[REPO].files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.data)
    return folder


def test_the_weights_are_stored_once_under_two_names(hub):
    done = accel.push(MODEL, REPO)
    files = hub.repos[REPO].files()
    assert done.commit == hub.repos[REPO].branches["main"] and set(done.files) <= set(files)
    for part in ("text_encoder", "unet", "vae_decoder"):
        first, second = files[f"{part}/model.safetensors"], files[f"{part}/weights.onnx_data"]
        assert first.lfs and second.lfs and first.sha256 == second.sha256
    assert hub.uploads == sum(map(len, hub.objects.values()))  # nothing was sent twice


def test_optimums_graph_differs_from_ours_in_the_name_of_the_weights_alone(hub, tmp_path):
    accel.push(MODEL, REPO)
    folder = cloned(hub, tmp_path / "clone")
    ours, theirs = ((folder / "unet" / name).read_bytes() for name in ("graph.onnx", "model.onnx"))
    assert ours != theirs and ours == theirs.replace(b"weights.onnx_data", b"model.safetensors")
    assert ours == Bundle.open(MODEL).file("unet/model.onnx").read_bytes()
    (folder / "unet/model.safetensors").unlink()  # optimum has none
    onnxruntime.InferenceSession(folder / "unet/model.onnx", providers=["CPUExecutionProvider"])


def test_a_clone_is_a_bundle(hub, tmp_path):
    accel.push(MODEL, REPO)
    bundle = Bundle.open(cloned(hub, tmp_path / "clone"))
    bundle.verify()
    accel.load_engine(bundle, "unet", "openvino", threads=1)


def test_pushing_again_removes_what_is_no_longer_there_and_leaves_what_is_not_ours(hub):
    accel.push(MODEL, REPO)
    repo = hub.repos[REPO]
    file = type(repo.files()["README.md"])
    repo.commit(repo.files() | {"images/seven.png": file(b"x", False), "engines/k/unet.plan": file(b"x", False)})
    accel.push("digits/1step-int8", REPO)
    files = repo.files()
    assert "images/seven.png" in files and "engines/k/unet.plan" not in files
    listed = json.loads(files["accel.json"].data)["files"]
    assert set(listed) <= set(files)


def test_nothing_new_makes_no_commit(hub):
    first = accel.push(MODEL, REPO)
    assert accel.push(MODEL, REPO).commit == first.commit


def test_engine_files_stay_here_unless_they_are_asked_for(hub, tmp_path):
    folder = shutil.copytree(Bundle.open(MODEL).path, tmp_path / "bundle")
    assert not any(name.startswith("engines/") for name in prepared(folder, REPO).names)
    with pytest.raises(UserError, match="has no engine files"):
        prepared(folder, REPO, engine_files=True)
    (folder / "engines/k").mkdir(parents=True)
    for name in ("unet.plan", "unet.json", "unet.sig"):
        (folder / "engines/k" / name).write_bytes(b"{}")
    assert not any(name.startswith("engines/") for name in prepared(folder, REPO).names)
    asked = prepared(folder, REPO, engine_files=True).names
    assert {name for name in asked if name.startswith("engines/")} == {"engines/k/unet.plan", "engines/k/unet.json"}


def test_a_changed_file_is_not_sent(hub, tmp_path):
    folder = shutil.copytree(Bundle.open(MODEL).path, tmp_path / "bundle")
    (folder / "unet/config.json").write_text("{}")
    with pytest.raises(UserError, match="unet/config.json"):
        accel.push(folder, REPO)
    assert hub.repos == {}


def test_a_licence_has_to_be_named_where_the_model_is_not_ours(smallest_bundle):
    with pytest.raises(UserError, match="licence") as refused:
        prepared(smallest_bundle, REPO)
    assert "--license" in refused.value.fix


def test_a_token_that_may_not_write_is_said(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another_one")
    with pytest.raises(UserError, match="refuses someone/digits to this token") as refused:
        accel.push(MODEL, REPO)
    assert "hf auth login" in refused.value.fix


def head_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_head_of_a_card_is_what_the_hub_reads(smallest_bundle):
    head = head_of(prepared(smallest_bundle, REPO, licence="openrail++", base_model="org/base").card)
    assert head["license"] == "openrail++" and head["base_model"] == "org/base"
    assert head["pipeline_tag"] == "text-to-image" and "base_model_relation" not in head
    assert {"onnx", "sd1", "fp32", "dpmpp_2m"} <= set(head["tags"])
    assert "base_model" not in head_of(prepared(smallest_bundle, REPO, licence="mit").card)


def test_a_card_has_the_parity_that_the_export_measured(smallest_bundle):
    card = prepared(smallest_bundle, REPO, licence="mit").card
    for record in Bundle.open(smallest_bundle).manifest.components.values():
        assert f"{record.parity['relative_l2']:.1e} from torch (limit {record.parity['limit']:.1e})" in card.replace(
            "\\", ""
        )


def test_a_card_has_the_command_that_made_it_without_folders_of_this_machine(accel_cli, smallest, tmp_path):
    made = tmp_path / "made"
    accel_cli("export", smallest, made, "--profile", "batch=1-4,size=32-64", "--overwrite")
    card = prepared(made, REPO, licence="mit").card
    command = card.split("## Made with\n\n```\n")[1].split("\n```")[0]
    assert command == f"accel export {smallest.name} --profile batch=1-4,size=32-64 --out my-bundle"
    parser = Parser(prog="accel export", description="", example="")
    export.add_arguments(parser)
    assert parser.parse_args(command.split()[2:]).profile == "batch=1-4,size=32-64"


def test_a_model_of_the_hub_is_the_base_without_its_revision(smallest_bundle, edit_manifest, tmp_path):
    folder = shutil.copytree(smallest_bundle, tmp_path / "bundle")
    edit_manifest(folder, lambda data: data.update(precision="fp16", source=data["source"] | {"name": "org/sd@v1"}))
    head = head_of(prepared(folder, REPO, licence="mit").card)
    assert head["base_model"] == "org/sd" and head["base_model_relation"] == "quantized"


def test_what_came_from_the_hub_is_pushed_elsewhere_the_same(hub):
    accel.push(MODEL, REPO)
    accel.push(Bundle.open(REPO), "someone/copy")
    first, second = (hub.repos[name].files() for name in (REPO, "someone/copy"))
    assert set(first) == set(second) and first["accel.json"].data == second["accel.json"].data


def test_a_benchmark_of_this_bundle_is_in_the_card(tmp_path):
    bundle = Bundle.open(MODEL)
    document = json.loads((ROOT / "benchmarks/digits.json").read_text())
    document["bundle"]["digest"] = bundle.digest
    (tmp_path / "bench.json").write_text(json.dumps(document))
    card = prepared(bundle, REPO, bench=tmp_path / "bench.json").card
    speed = card.split("## Speed")[1]
    assert "| variant | text | UNet step |" in speed and "| eager" in speed and document["rows"][0]["variant"] in speed


def test_a_benchmark_of_another_bundle_is_refused(smallest_bundle):
    with pytest.raises(UserError, match="measured another bundle"):
        prepared(smallest_bundle, REPO, licence="mit", bench=ROOT / "benchmarks/digits.json")


@pytest.fixture
def accel_cli():
    from accel.cli import main

    def call(*args) -> None:
        assert main([str(arg) for arg in args]) == 0

    return call
