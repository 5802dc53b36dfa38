"""Bundles of a hub: only what is read is fetched, once, and only as it was exported."""

from __future__ import annotations

import numpy as np
import pytest
from huggingface_hub import constants

import accel
from accel import UserError
from accel.bundle import Bundle, is_bundle
from accel.bundle.hub import find, origin
from accel.trt.engine_files import sources

MODEL, REPO = "digits/4step-int8", "someone/digits"
WEIGHTS = "unet/model.safetensors"


@pytest.fixture
def pushed(hub):
    """A hub with the digits on it."""
    accel.push(MODEL, REPO)
    hub.requests.clear()
    return hub


def asked_again() -> None:
    origin._answers.clear()


def test_it_draws_the_same_image_from_the_files_that_the_engine_reads(pushed):
    pipe = accel.load(REPO, engine="onnxruntime", threads=1)
    image = pipe("a handwritten seven", seed=7, output_type="np").images
    own = accel.load(MODEL, engine="onnxruntime", threads=1)("a handwritten seven", seed=7, output_type="np").images
    assert np.array_equal(image, own)
    graphs = {name for name in pushed.downloaded() if name.endswith((".onnx", ".onnx_data"))}
    assert graphs == {f"{part}/model.uint8.onnx" for part in ("text_encoder", "unet", "vae_decoder")}
    assert pipe.bundle.origin.commit == pushed.repos[REPO].branches["main"] and REPO in repr(pipe.bundle)


def test_another_engine_fetches_its_graph_alone(pushed):
    accel.load_engine(REPO, "unet", "onnxruntime", threads=1)
    pushed.requests.clear()
    accel.load_engine(REPO, "unet", "openvino", threads=1)
    assert pushed.downloaded() == ["unet/graph.onnx"]
    pushed.requests.clear()
    asked_again()
    accel.load_engine(REPO, "unet", "openvino", threads=1)
    assert pushed.downloaded() == []


def test_every_file_lies_on_the_disk_once(pushed):
    bundle = Bundle.open(REPO)
    bundle.verify()
    assert all(bundle.file(entry).stat().st_nlink == 2 for entry in bundle.manifest.files)


def test_engine_files_of_the_local_bundle_are_those_of_the_fetched_one(pushed):
    there, here = Bundle.open(REPO), Bundle.open(MODEL)
    for name, record in here.manifest.components.items():
        assert sources(there, there.component(name)) == sources(here, record)


def test_a_revision_is_fetched_and_recorded(pushed):
    first = pushed.repos[REPO].branches["main"]
    accel.push("digits/1step-int8", REPO)
    asked_again()
    assert Bundle.open(REPO).manifest.source["name"] == "digits/1step"
    old = Bundle.open(f"{REPO}@{first}")
    assert old.manifest.source["name"] == "digits/4step" and old.origin.commit == first
    assert (
        accel.load(REPO, engine="onnxruntime", revision=first, threads=1, low_memory=True).bundle.origin == old.origin
    )
    with pytest.raises(UserError, match="no revision 'v9'"):
        Bundle.open(f"{REPO}@v9")
    with pytest.raises(UserError, match="revision 'v9' is for a hub id"):
        accel.load(MODEL, revision="v9")


def test_a_branch_is_pushed_to_and_read(pushed):
    accel.push("digits/1step-int8", REPO, revision="one-step")
    assert Bundle.open(f"{REPO}@one-step").manifest.source["name"] == "digits/1step"
    assert Bundle.open(REPO).manifest.source["name"] == "digits/4step"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(pushed, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    pushed.cut[WEIGHTS] = 1_000_000
    bundle = Bundle.open(REPO)
    bundle.verify(["unet"])
    ranges = [start for method, path, start in pushed.requests if method == "GET" and path.endswith(WEIGHTS)]
    assert ranges[0] is None and ranges[1].startswith("bytes=") and 0 < int(ranges[1][6:-1]) <= 1_000_000
    assert bundle.file(WEIGHTS).read_bytes() == Bundle.open(MODEL).file(WEIGHTS).read_bytes()


def test_after_an_interruption_only_the_rest_is_asked_for(pushed, monkeypatch):
    bundle = Bundle.open(REPO)
    bundle.verify(["text_encoder"])
    pushed.requests.clear()
    bundle.verify()
    assert not any(name.startswith("text_encoder") for name in pushed.downloaded()) and WEIGHTS in pushed.downloaded()


def test_a_changed_file_is_refused_and_fetched_anew_when_it_is_right_again(pushed):
    right = pushed.repos[REPO].files()[WEIGHTS].data
    pushed.change(REPO, WEIGHTS, right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(UserError, match="unet/model.safetensors was changed after export") as refused:
        accel.load(REPO, engine="onnxruntime", threads=1)
    assert "ask its author" in refused.value.fix
    pushed.change(REPO, WEIGHTS, right)
    Bundle.open(REPO).verify()


def test_a_file_that_is_asked_for_by_name_alone_is_compared_too(pushed):
    pushed.change(REPO, "unet/config.json", b"{}")
    with pytest.raises(UserError, match="unet/config.json has 2 bytes"):
        Bundle.open(REPO).file("unet/config.json")


def test_a_private_repository_without_a_token_says_what_to_do(pushed, monkeypatch):
    pushed.repos[REPO].private = True
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="private and this machine has no token") as refused:
        accel.load(REPO)
    assert "hf auth login" in refused.value.fix


def test_without_a_network_what_was_loaded_is_loaded_again(pushed, monkeypatch):
    Bundle.open(REPO).verify()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pushed.close()
    asked_again()
    bundle = Bundle.open(REPO)
    bundle.verify()
    assert is_bundle(REPO) and bundle.origin.repo == REPO
    with pytest.raises(UserError, match="someone/else is not in the cache, and the hub cannot be reached"):
        Bundle.open("someone/else")


def test_without_a_network_a_file_that_was_not_loaded_is_named_as_such(pushed, monkeypatch):
    bundle = Bundle.open(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache"):
        bundle.verify()


def test_a_pipeline_of_the_hub_is_no_bundle(pushed):
    files = pushed.repos[REPO].files()
    pushed.repos["someone/pipeline"] = type(pushed.repos[REPO])()
    pushed.repos["someone/pipeline"].commit({"model_index.json": files["model_index.json"]})
    assert find("someone/pipeline") is None and not is_bundle("someone/pipeline")
    with pytest.raises(UserError, match="has no accel.json on the hub"):
        Bundle.open("someone/pipeline")


def test_a_folder_of_the_cache_knows_where_its_files_come_from(pushed):
    folder = Bundle.open(REPO).path
    Bundle.open(folder).verify(["unet"])
    assert (folder / WEIGHTS).is_file()


def test_no_other_folder_says_where_its_files_come_from(pushed, tmp_path):
    folder = Bundle.open(REPO).path
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (origin.MANIFEST, origin.RECORD):
        (copy / name).write_bytes((folder / name).read_bytes())
    pushed.requests.clear()
    with pytest.raises(UserError, match="is missing"):
        Bundle.open(copy).verify()
    assert pushed.requests == []
