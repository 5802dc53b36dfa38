import copy
import json
import os
import shutil
from pathlib import Path

import pytest

import accel
from accel.bundle import MANIFEST, SCHEMA, Bundle, finalize, verified
from accel.cli import main
from accel.errors import UserError

WEIGHTS = "vae_decoder/model.safetensors"


def flip_a_byte(path: Path, at: int = -5) -> None:
    """Change one byte in place: same size, same inode, and the old modification time put back."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def refusal(path) -> UserError:
    with pytest.raises(UserError) as caught:
        Bundle.open(path)
    assert caught.value.fix
    return caught.value


# Opening


def test_a_bundle_opens_and_is_intact(sd15_bundle):
    bundle = Bundle.open(sd15_bundle)
    bundle.verify()
    assert set(bundle.manifest.components) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}


def test_reading_and_writing_the_manifest_loses_nothing(sd15_bundle):
    written = json.loads((sd15_bundle / MANIFEST).read_text())
    assert json.loads(json.dumps(Bundle.open(sd15_bundle).manifest.as_dict())) == written


def test_every_file_is_listed_and_nothing_else(sd15_bundle):
    there = {p.relative_to(sd15_bundle).as_posix() for p in sd15_bundle.rglob("*") if p.is_file()}
    assert set(Bundle.open(sd15_bundle).manifest.files) == there - {MANIFEST}


def test_the_digest_is_of_the_content_and_not_of_the_place(sd15_bundle, bundle_copy, edit_manifest):
    assert Bundle.open(bundle_copy).digest == Bundle.open(sd15_bundle).digest
    edit_manifest(bundle_copy, lambda data: data["sampler"].update(guidance=6))
    assert Bundle.open(bundle_copy).digest != Bundle.open(sd15_bundle).digest


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refusal(tmp_path / "nothing").message


def test_a_file_is_no_bundle(tmp_path):
    (tmp_path / "model.onnx").write_text("")
    assert str(tmp_path / "model.onnx") in refusal(tmp_path / "model.onnx").message


def test_a_diffusers_pipeline_given_by_mistake_is_recognised(sd15):
    error = refusal(sd15)
    assert "diffusers pipeline, not a bundle" in error.message
    assert error.fix.startswith(f"accel export {sd15}")


def test_any_other_folder_is_no_bundle(tmp_path):
    assert MANIFEST in refusal(tmp_path).message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b"\xff\xfe",
        b"{}",
        b'{"schema": "1"}',
        b'{"schema": true}',
        b'{"schema": 0}',
        b'{"schema": -1}',
        b"[" * 100_000,
    ],
)
def test_a_broken_manifest_is_refused(bundle_copy, content):
    (bundle_copy / MANIFEST).write_bytes(content)
    assert MANIFEST in refusal(bundle_copy).message


def test_a_newer_schema_asks_for_an_upgrade(bundle_copy, edit_manifest):
    edit_manifest(bundle_copy, lambda data: data.update(schema=SCHEMA + 1, components={"new": "layout"}))
    error = refusal(bundle_copy)
    assert f"schema {SCHEMA + 1}" in error.message and "upgrade" in error.fix


def places(value, path=()):
    """Every place in a JSON document; of lists, the first entry only."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))
    elif isinstance(value, list) and value:
        yield (*path, 0)
        yield from places(value[0], (*path, 0))


def test_a_manifest_with_any_part_missing_or_of_another_kind_never_ends_in_a_traceback(bundle_copy, capsys):
    whole = json.loads((bundle_copy / MANIFEST).read_text())
    whole["files"] = dict(list(whole["files"].items())[:2])
    for key in ("operators", "shapes"):
        for component in whole["components"].values():
            component["parity"].pop(key)
    whole["components"] = {"unet": whole["components"]["unet"]}
    whole["files"] |= {f"unet/{name}": {"sha256": "0" * 64, "bytes": 1} for name in ("model.onnx", "model.safetensors")}
    seen = 0
    for place in places(whole):
        for damage in ("missing", None, 7, "text", [], {}, [1], {"a": 1}):
            data = copy.deepcopy(whole)
            parent = data
            for key in place[:-1]:
                parent = parent[key]
            if damage == "missing":
                del parent[place[-1]]
            else:
                parent[place[-1]] = damage
            (bundle_copy / MANIFEST).write_text(json.dumps(data))
            assert main(["inspect", str(bundle_copy), "--no-verify"]) in (0, 1)
            assert main(["inspect", str(bundle_copy)]) in (0, 1)
            errors = capsys.readouterr().err
            assert "Traceback" not in errors, f"{place} = {damage!r}: {errors[-600:]}"
            seen += 1
    assert seen > 500


@pytest.mark.parametrize(
    "key",
    ["family", "topology", "pipeline", "sampler", "profile", "precision", "source", "exporter", "components", "files"],
)
def test_a_missing_part_of_the_manifest_is_named(bundle_copy, edit_manifest, key):
    edit_manifest(bundle_copy, lambda data: data.pop(key))
    error = refusal(bundle_copy)
    assert "damaged" in error.message and key in error.message


def test_a_component_that_is_not_there_lists_those_that_are(sd15_bundle):
    with pytest.raises(UserError, match="text_encoder_2") as caught:
        Bundle.open(sd15_bundle).component("text_encoder_2")
    assert "text_encoder, unet" in caught.value.fix


# Nothing outside the folder is read


@pytest.mark.parametrize("entry", ["../outside.bin", "/etc/hostname", "unet/../../outside.bin", "C:/x", "unet\\x"])
def test_a_manifest_entry_that_leaves_the_folder_is_refused(bundle_copy, edit_manifest, entry):
    (bundle_copy.parent / "outside.bin").write_text("secret")
    edit_manifest(bundle_copy, lambda data: data["files"].update({entry: {"sha256": "0" * 64, "bytes": 6}}))
    assert "refused" in refusal(bundle_copy).message


@pytest.mark.parametrize("field", ["graph", "weights"])
@pytest.mark.parametrize("entry", ["../outside.bin", "/etc/hostname"])
def test_a_component_that_leaves_the_folder_is_refused(bundle_copy, edit_manifest, field, entry):
    def change(data):
        data["components"]["unet"][field] = entry

    edit_manifest(bundle_copy, change)
    refusal(bundle_copy)


def test_a_component_file_that_is_not_listed_is_refused(bundle_copy, edit_manifest):
    shutil.copy(bundle_copy / "unet/model.onnx", bundle_copy / "unet/other.onnx")
    edit_manifest(bundle_copy, lambda data: data["components"]["unet"].update(graph="unet/other.onnx"))
    assert "not listed" in refusal(bundle_copy).message


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_symbolic_link_is_refused(bundle_copy, what):
    path = bundle_copy / ("unet/model.onnx" if what == "file" else "unet")
    moved = bundle_copy.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    assert "symbolic link" in refusal(bundle_copy).message


def reseal(bundle: Path) -> None:
    """Make the manifest's digests those of the files as they are now, as an attacker would."""
    for path in bundle.rglob("*"):
        assert not path.is_symlink()
    data = json.loads((bundle / MANIFEST).read_text())
    finalize(bundle, Bundle.open(bundle).manifest)
    assert set(json.loads((bundle / MANIFEST).read_text())["files"]) >= set(data["files"])


def redirect_initializers(model, location: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def redirect_constant(model, location: str) -> None:
    """External data of a Constant node instead of an initializer."""
    import onnx

    tensor = next(t for t in model.graph.initializer if t.external_data)
    model.graph.initializer.remove(tensor)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))


@pytest.mark.parametrize("redirect", [redirect_initializers, redirect_constant])
@pytest.mark.parametrize("location", ["../../outside.bin", "OUTSIDE", "link.bin", "unlisted.bin"])
def test_a_graph_whose_weights_lie_outside_is_refused_although_all_digests_match(bundle_copy, redirect, location):
    import onnx

    outside = bundle_copy.parent / "outside.bin"
    shutil.copy(bundle_copy / WEIGHTS, outside)
    path = bundle_copy / "vae_decoder/model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    redirect(model, str(outside) if location == "OUTSIDE" else location)
    path.write_bytes(model.SerializeToString())
    reseal(bundle_copy)
    if location == "link.bin":
        (bundle_copy / "vae_decoder/link.bin").symlink_to(outside)
    if location == "unlisted.bin":
        shutil.copy(outside, bundle_copy / "vae_decoder/unlisted.bin")
    for engine in ("onnxruntime", "openvino"):
        with pytest.raises(UserError, match="refused|not listed") as caught:
            accel.load_engine(bundle_copy, "vae_decoder", engine)
        assert (location if location != "OUTSIDE" else str(outside)) in caught.value.message


def test_resealing_alone_keeps_a_bundle_usable(bundle_copy):
    reseal(bundle_copy)
    Bundle.open(bundle_copy).verify()
    accel.load_engine(bundle_copy, "vae_decoder", "onnxruntime")


# Verification


def test_a_truncated_file_is_told_by_its_size(bundle_copy):
    path = bundle_copy / WEIGHTS
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match=f"{WEIGHTS} has .* bytes where"):
        Bundle.open(bundle_copy).verify()


@pytest.mark.parametrize("entry", [WEIGHTS, "unet/model.onnx", "unet/config.json"])
def test_one_flipped_byte_is_noticed_by_whatever_uses_the_file(bundle_copy, entry):
    flip_a_byte(bundle_copy / entry)
    with pytest.raises(UserError, match=f"{entry} was changed after export"):
        Bundle.open(bundle_copy).verify()
    with pytest.raises(UserError, match=entry):
        accel.load_engine(bundle_copy, entry.partition("/")[0], "eager")
    with pytest.raises(UserError, match=entry):
        accel.load(bundle_copy, "eager")


def test_a_deleted_file_is_named(bundle_copy):
    (bundle_copy / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WEIGHTS} is missing"):
        Bundle.open(bundle_copy).verify()


@pytest.mark.parametrize("entry", ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"])
def test_an_edited_companion_is_noticed_when_the_pipeline_is_loaded(bundle_copy, entry):
    path = bundle_copy / entry
    path.write_text(path.read_text().replace("{", "{ ", 1))
    with pytest.raises(UserError, match=entry):
        accel.load(bundle_copy, "onnxruntime")


def test_only_the_chosen_folders_are_checked(bundle_copy):
    (bundle_copy / WEIGHTS).unlink()
    Bundle.open(bundle_copy).verify(["unet", "tokenizer"])
    with pytest.raises(UserError):
        Bundle.open(bundle_copy).verify(["vae_decoder"])


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that were really hashed."""
    names = []
    sha256 = verified.sha256

    def counted(path):
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(verified, "sha256", counted)
    return names


def test_files_are_hashed_once_and_again_only_when_they_change(bundle_copy, hashed):
    files = len(Bundle.open(bundle_copy).manifest.files)
    Bundle.open(bundle_copy).verify(["unet"])
    assert 0 < len(hashed) < files
    Bundle.open(bundle_copy).verify()
    assert len(hashed) == files
    Bundle.open(bundle_copy).verify()
    assert len(hashed) == files
    os.utime(bundle_copy / WEIGHTS)
    Bundle.open(bundle_copy).verify()
    assert len(hashed) == files + 1


def test_a_changed_byte_is_noticed_after_verification_although_size_and_time_are_the_same(bundle_copy):
    Bundle.open(bundle_copy).verify()
    flip_a_byte(bundle_copy / WEIGHTS)
    with pytest.raises(UserError, match="was changed after export"):
        Bundle.open(bundle_copy).verify()


def test_another_bundle_in_the_same_place_is_checked_afresh(bundle_copy, sd15_bundle):
    Bundle.open(bundle_copy).verify()
    shutil.rmtree(bundle_copy)
    shutil.copytree(sd15_bundle, bundle_copy)
    flip_a_byte(bundle_copy / WEIGHTS)
    with pytest.raises(UserError, match="was changed after export"):
        Bundle.open(bundle_copy).verify()


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b'{"vae_decoder/model.safetensors": []}', b"[" * 100_000])
def test_a_damaged_verification_cache_only_costs_a_hash(bundle_copy, monkeypatch, tmp_path, content, hashed):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    Bundle.open(bundle_copy).verify()
    (stamps,) = (tmp_path / "cache" / "verified").iterdir()
    stamps.write_bytes(content)
    hashed.clear()
    Bundle.open(bundle_copy).verify()
    assert len(hashed) == len(Bundle.open(bundle_copy).manifest.files)


def test_a_cache_that_cannot_be_written_is_no_obstacle(bundle_copy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "file" / "cache"))
    Bundle.open(bundle_copy).verify()
