"""Readers during an overwrite get the old bundle or the new one, whole."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

import accel
from accel import files
from accel.bundle import Bundle
from accel.bundle.replaced import steadily
from accel.errors import UserError


def test_a_reader_never_gets_the_manifest_of_one_and_the_files_of_the_other(tmp_path):
    """A writer replaces the bundle as fast as it can, while a reader checks and reads whatever is there."""
    out, bundles = tmp_path / "out", [Bundle.open(f"digits/{name}-int8") for name in ("tiny-1step", "tiny-4step")]
    stop, written = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            bundle = bundles[len(written) % 2]
            with files.new_folder(out, overwrite=True) as folder:
                for name in ("text_encoder", "tokenizer", "scheduler"):
                    bundle.copy(folder, name)
                shutil.copyfile(bundle.path / "accel.json", folder / "accel.json")
            written.append(1)

    def read(bundle: Bundle) -> tuple[str, str]:
        bundle.verify(["text_encoder", "scheduler"])
        return bundle.digest, files.sha256(bundle.file("text_encoder/model.safetensors"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not out.exists():
            pass
        known = {(bundle.digest, files.sha256(bundle.file("text_encoder/model.safetensors"))) for bundle in bundles}
        for _ in range(60):
            try:
                assert steadily(out, read) in known
            except UserError as error:
                assert "replaced again and again" in error.message
    finally:
        stop.set()
        writer.join()
    assert len(written) > 10


def test_an_engine_that_was_loaded_goes_on_when_its_bundle_is_replaced(bundle):
    engine = accel.load_engine(bundle, "text_encoder", "onnxruntime")
    (spec,) = engine.component.inputs
    ids = np.ones(spec.concrete({dim: limits.min for dim, limits in engine.component.dims.items()}), np.int64)
    before = engine(input_ids=ids)
    with files.new_folder(bundle, overwrite=True) as folder:
        (folder / "accel.json").write_text("{}")
    assert all(np.array_equal(value, before[name]) for name, value in engine(input_ids=ids).items())
    with pytest.raises(UserError):
        accel.load_engine(bundle, "text_encoder", "onnxruntime")
