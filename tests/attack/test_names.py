"""Names out of files never lead outside the folder, nor raw onto a terminal, nor with a meaning into another format."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import accel
from accel.bundle import Bundle
from accel.errors import UserError
from accel.export.triton import repository
from accel.files import inside
from accel.models.lora.reading import alpha_of

EVIL = [
    "../../evil",
    "/tmp/evil",
    ".hidden",
    "a/b",
    "unet\\evil",
    "x\x1b[2J",
    "x\u202ey",
    "",
    "UNET",
    "con:",
    "a" * 300,
    "u\0",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_component_has_a_name_of_the_closed_set_or_there_is_no_bundle(bundle, edit_manifest, tmp_path, name):
    edit_manifest(bundle, lambda data: data["components"].update({name: data["components"].pop("unet")}))
    before = sorted(tmp_path.rglob("*"))
    for attempt in (
        lambda: repository.write(Bundle.open(bundle), tmp_path / "place/out"),
        lambda: accel.load_engine(bundle, name, "openvino"),
        lambda: accel.load(bundle),
    ):
        with pytest.raises(UserError, match="damaged") as caught:
            attempt()
        assert str(caught.value).replace("\n", "").isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("what", ["tensor", "dim", "graph", "weights", "engine graph", "file", "dtype", "kind"])
def test_every_other_name_of_a_manifest_is_checked_too(bundle, edit_manifest, what, name):
    def change(data):
        unet = data["components"]["unet"]
        if what == "tensor":
            unet["inputs"][0]["name"] = name
        elif what == "dim":
            unet["dims"][name] = unet["dims"]["batch"]
        elif what in ("graph", "weights"):
            unet[what] = f"unet/{name}"
        elif what == "engine graph":
            unet["int8"]["graphs"]["onnxruntime"] = name
        elif what == "file":
            data["files"][name] = {"sha256": "0" * 64, "bytes": 1}
        elif what == "dtype":
            unet["inputs"][0]["dtype"] = name
        else:
            unet["kind"] = name

    edit_manifest(bundle, change)
    if (what, name) in (("tensor", "UNET"), ("dim", "UNET"), ("file", ".hidden"), ("file", "a/b"), ("file", "UNET")):
        pytest.skip("that is a name")
    if what == "file" and len(name) == 300:
        pytest.skip("it is only missing")
    with pytest.raises(UserError) as caught:
        Bundle.open(bundle).verify()
        accel.load_engine(bundle, "unet", "onnxruntime")
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "place", ["family", "topology", "precision", "source.name", "profile.name", "exporter.torch", "sampler.name"]
)
def test_words_that_would_steer_a_terminal_are_no_words(bundle, edit_manifest, place):
    def change(data):
        *path, last = place.split(".")
        for key in path:
            data = data[key]
        data[last] = "x\x1b]0;owned\x07"

    edit_manifest(bundle, change)
    with pytest.raises(UserError, match="not a line of text") as caught:
        Bundle.open(bundle)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["components"]["unet"]["dims"]["batch"].update(multiple=0),
        lambda data: data["components"]["unet"]["dims"]["batch"].update(max=1 << 60),
        lambda data: data["components"]["unet"]["dims"]["batch"].update(min=9, max=2),
        lambda data: data["profile"]["height"].update(min=-64),
        lambda data: data["profile"].update(tokens=0),
        lambda data: data["profile"].update(step=-8),
        lambda data: data["profile"].update(vae_tile=1 << 40),
        lambda data: data["pipeline"].update(scaling_factor=0),
        lambda data: data["pipeline"].update(scaling_factor=float("nan")),
        lambda data: data["pipeline"].update(vae_scale=0),
        lambda data: data["pipeline"].update(latent_multiple=0),
        lambda data: data["pipeline"].update(latent_channels=1 << 40),
        lambda data: data["components"]["unet"]["inputs"][0].update(shape=[0, 4, 8, 8]),
        lambda data: data["components"]["unet"].update(inputs=[]),
        lambda data: data["components"]["unet"].update(inputs=data["components"]["unet"]["inputs"][:1] * 2),
        lambda data: data["files"]["unet/model.onnx"].update(sha256="../x"),
        lambda data: data["files"]["unet/model.onnx"].update(bytes=-1),
    ],
)
def test_numbers_that_no_network_has_are_refused_when_the_manifest_is_read(bundle, edit_manifest, change):
    edit_manifest(bundle, change)
    with pytest.raises(UserError, match="is damaged"):
        Bundle.open(bundle)


def test_files_that_the_manifest_does_not_list_are_not_read(bundle):
    """A pipe would be waited for, a device read for ever."""
    os.mkfifo(bundle / "tokenizer/special_tokens_map.json")
    (bundle / "tokenizer/added_tokens.json").symlink_to("/dev/zero")
    accel.load(bundle, "onnxruntime", low_memory=True)


def test_a_listed_file_that_is_a_pipe_or_a_device_is_refused_at_once(bundle):
    for name, make in (("pipe", os.mkfifo), ("device", lambda path: path.symlink_to("/dev/zero"))):
        path = bundle / "tokenizer/tokenizer_config.json"
        path.unlink()
        make(path)
        with pytest.raises(UserError, match="missing|symbolic link|ordinary"):
            accel.load(bundle, "onnxruntime", low_memory=True, verify=name == "pipe")


def test_text_format_quotes_every_text():
    evil = 'x" } instance_group { kind: "\n\\\x1b\u202e'
    text = repository.text_format({"name": evil})
    assert text.count("\n") == 1 and text.isascii() and text.replace("\n", "").isprintable()
    inner = re.fullmatch(r'name: "((?:[^"\\]|\\[0-7]{3})*)"\n', text)[1]
    octal = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), inner)
    assert octal.encode("latin-1").decode() == evil


def test_a_name_in_an_error_or_a_note_reaches_no_terminal_raw(tmp_path):
    folder = tmp_path / "a\x1b[31m\u202eb"
    done = subprocess.run(
        [sys.executable, "-m", "accel", "inspect", str(folder)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1 and "\x1b" not in done.stderr and r"a\x1b[31m\u202eb" in done.stderr


@pytest.mark.parametrize("entry", ["x\x1b", "x\n", "x\u2028y"])
def test_a_path_that_cannot_be_shown_is_no_path(tmp_path, entry):
    with pytest.raises(UserError, match="cannot be shown"):
        inside(tmp_path, entry, "the entry")


@pytest.mark.parametrize("pattern", ["(a+)+$", "a|b", "[", ".*", "(?:x{9999}){9999}", "x" * 10 + "(" * 5000])
def test_an_expression_in_a_lora_is_not_run(tmp_path, pattern):
    with pytest.raises(UserError, match="names no module but an expression"):
        alpha_of({"alpha_pattern": {pattern: 4}}, "a" * 50 + "b", tmp_path / "x.safetensors")


def test_a_plain_name_in_a_lora_counts_as_peft_reads_it(tmp_path):
    settings = {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 16, r"^mid\.to_k$": 4}}
    names = {"down.attn1.to_q": 16, "attn1.to_q": 16, "xattn1.to_q": 8, "mid.to_k": 4, "down.to_k": 8}
    assert {name: alpha_of(settings, name, tmp_path) for name in names} == names


@pytest.mark.parametrize("alpha", ["8", None, [1], float("nan"), float("inf"), True])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, alpha):
    with pytest.raises(UserError, match="not a number"):
        alpha_of({"lora_alpha": alpha}, "x", tmp_path)


def test_a_manifest_of_absurd_depth_or_size_is_refused_at_once(bundle):
    for text in ("[" * 100_000, '{"b": "' + "x" * (17 << 20) + '"}', '{"x":' * 50 + "1" + "}" * 50):
        (bundle / "accel.json").write_text(text)
        with pytest.raises(UserError, match="the manifest"):
            Bundle.open(bundle)
