"""Engine files on disk: identity, records that are damaged, old or new, and places they may not lie in."""

from __future__ import annotations

import json
import os

import pytest

from accel.bundle import Bundle
from accel.cli import main
from accel.errors import UserError
from accel.trt import engine_files, preflight

# As accel 0.1 wrote it, of a static text encoder.
RECORD = """{
  "schema": 1,
  "component": "text_encoder",
  "key": "318c4fbb4edc3fd75ecdf77acf58543f",
  "identity": {
    "component": "text_encoder",
    "graph_sha256": "0a",
    "weights_sha256": "0b",
    "exporter": {"opset": 20, "torch": "2.9.0"},
    "precision": "fp16",
    "dtype": "float16",
    "float32": [],
    "int8": {},
    "tensorrt": "10.16.1.11",
    "gpu": "NVIDIA L4",
    "compute_capability": "8.9",
    "platform": "Linux x86_64",
    "profiles": [{"name": "sd-512-static", "dims": {"images": [1, 1, 1]}, "shapes": {}}],
    "options": {"optimization_level": 3, "tf32": false, "workspace": null, "refittable": false,
      "version_compatible": false, "hardware_compatible": "none", "strip_plan": false, "weight_streaming": false}
  },
  "plan": {"file": "text_encoder.plan", "bytes": 5, "sha256": "0c"},
  "audit": {"layers": 1, "heavy": {"fp16": 1}, "float32_layers": [], "int8_nodes": [], "wanted": "fp16"},
  "estimate": {"weights": 1, "activations": 1, "device": 1, "host": 1},
  "seconds": 1.5,
  "built": "2025-11-01T00:00:00.000000+00:00"
}
"""
RECORD_KEY = json.loads(RECORD)["key"]


def test_a_record_of_0_1_is_read_and_its_key_is_still_the_digest_of_its_identity(bundle):
    folder = bundle.path / "engines" / RECORD_KEY
    folder.mkdir(parents=True)
    (folder / "text_encoder.plan").write_bytes(b"bytes")
    (folder / "text_encoder.json").write_text(RECORD)
    file = engine_files.read(bundle, RECORD_KEY, "text_encoder")
    assert preflight.damaged(file) == "" and file.identity["profiles"][0]["name"] == "sd-512-static"


def test_records_without_a_field_or_from_the_future_are_named(bundle, save, here):
    file = save()
    path = file.path.with_suffix(".json")
    whole = path.read_text()
    for lacking, change in (
        ("gpu", lambda r: r["identity"].pop("gpu")),
        ("options", lambda r: r["identity"].update(options=None)),
        ("profiles.0", lambda r: r["identity"].update(profiles=["one"])),
        ("name", lambda r: r["identity"]["profiles"][0].pop("name")),
        ("sha256", lambda r: r["plan"].pop("sha256")),
    ):
        record = json.loads(whole)
        change(record)
        path.write_text(json.dumps(record))
        (found,) = engine_files.find(bundle)
        assert isinstance(found, UserError) and f".{lacking}: " in found.message
        assert main(["inspect", str(bundle.path), "--no-verify"]) == main(["trust", str(bundle.path)]) == 0
    newer = whole.replace('"schema": 1', '"schema": 2')
    for text, reason in (("no json", "damaged"), ("[]", "damaged"), (newer, "newer")):
        path.write_text(text)
        with pytest.raises(UserError, match=reason):
            preflight.choose(bundle, "vae_decoder", here)


def test_a_text_file_named_plan_is_not_an_engine_file(bundle, here):
    folder = bundle.path / "engines" / "whatever"
    folder.mkdir(parents=True)
    (folder / "vae_decoder.plan").write_text("hello")
    with pytest.raises(UserError, match="accel did not build it"):
        preflight.choose(bundle, "vae_decoder", here)


def test_an_engine_file_behind_a_link_is_refused(bundle, save, here, tmp_path):
    file = save()
    elsewhere = tmp_path / "elsewhere"
    file.path.parent.rename(elsewhere)
    file.path.parent.symlink_to(elsewhere)
    with pytest.raises(UserError, match="symbolic link"):
        preflight.choose(bundle, "vae_decoder", here)


def test_an_engine_file_is_private_where_new_folders_are_not(bundle, save, fit):
    before = os.umask(0o002)
    try:
        save()
    finally:
        os.umask(before)
    assert fit(Bundle.open(bundle.path)).ok


def test_the_newest_comes_first_and_every_option_is_part_of_the_key(save, bundle):
    keys = {save().key, save(tf32=True).key, save(strip_plan=True).key, save(optimization_level=4).key}
    assert len(keys) == 4 and {file.key for file in engine_files.find(bundle)} == keys
    assert save(timing_cache=False).key in keys  # it changes how long a build takes, not what it makes
