"""Nothing that lies in a model's folder is run, whatever its configs ask for, and nobody is asked on the terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import accel
from accel.assets import DIGITS
from accel.errors import Notice, UserError
from accel.models.config_files import clip_tokenizer, copy_folder, stripped
from accel.models.networks import on_meta
from accel.models.pipeline_bundle import open_pipeline
from accel.models.source import open_source

CODE = "import os, pathlib\npathlib.Path(os.environ['ACCEL_TRAP']).write_text('ran')\nclass Mine: pass\n"
FIELDS = {
    "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", "mine.Mine"]},
    "trust_remote_code": True,
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "custom_pipeline": "mine",
}


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """A copy of a real pipeline with code in every folder, and configs that ask for it."""
    folder = Path(shutil.copytree(DIGITS / "tiny", tmp_path / "model"))
    for path in [p for p in folder.rglob("*.json") if p.name not in ("vocab.json", "tokenizer.json", "sampler.json")]:
        (path.parent / "mine.py").write_text(CODE)
        path.write_text(json.dumps(json.loads(path.read_text()) | FIELDS))
    monkeypatch.setenv("ACCEL_TRAP", str(tmp_path / "trap"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
    yield folder
    assert not (tmp_path / "trap").exists(), "code out of the folder was run"
    assert sys.stdin.tell() == 0, "somebody was asked"


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_network_with_code_in_its_config_loads_without_it_and_says_so(trapped, component):
    with pytest.warns(Notice, match="would load code, and is left out"):
        loaded = open_source(trapped).load(component)
    plain = open_source(DIGITS / "tiny").load(component)
    assert type(loaded) is type(plain)
    assert all((a == b).all() for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def test_a_tokenizer_with_code_in_its_config_is_clips_own(trapped):
    with pytest.warns(Notice, match="would load code"):
        tokenizer = clip_tokenizer(trapped / "tokenizer")
    assert type(tokenizer).__name__.startswith("CLIPTokenizer")
    assert tokenizer("a seven").input_ids == clip_tokenizer(DIGITS / "tiny/tokenizer")("a seven").input_ids


def test_code_is_not_copied_into_what_we_write(trapped, tmp_path):
    with pytest.warns(Notice, match="mine.py is neither weights nor settings"):
        copy_folder(trapped / "tokenizer", tmp_path / "copy")
    assert not list((tmp_path / "copy").glob("*.py"))
    assert not set(FIELDS) & set(json.loads((tmp_path / "copy/tokenizer_config.json").read_text()))


@pytest.mark.parametrize(
    "entry",
    [["mine", "Mine"], ["os", "system"], ["diffusers", "DiffusionPipeline"], ["diffusers", "AutoModel"],
     ["transformers", "AutoModel"], ["transformers", "pipeline"], ["diffusers", "UNet2DConditionModel.a"]],
)  # fmt: skip
def test_a_class_that_is_not_in_the_list_is_refused(trapped, entry):
    index = json.loads((trapped / "model_index.json").read_text())
    (trapped / "model_index.json").write_text(json.dumps(index | {"unet": entry}))
    with pytest.warns(Notice), pytest.raises(UserError, match="unet is a"):
        open_source(trapped).load("unet")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "x\x1b[31m", "", "UNet"])
def test_the_name_of_a_part_cannot_be_a_path(trapped, name):
    index = json.loads((trapped / "model_index.json").read_text())
    (trapped / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UserError, match="cannot be the name of a part") as caught:
        open_source(trapped)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "field, value",
    [("num_hidden_layers", 10**9), ("max_position_embeddings", 10**12), ("hidden_size", float("inf")),
     ("quantization_config", {"quant_method": "bitsandbytes"}), ("hidden_act", "nothing_like_it"),
     ("num_attention_heads", 0), ("vocab_size", -1), ("intermediate_size", "x"), ("layers", [1] * 10**5)],
)  # fmt: skip
def test_an_absurd_config_is_a_sentence_at_once(tmp_path, field, value):
    config = json.loads((DIGITS / "tiny-1step-int8/text_encoder/config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json"):
        on_meta("text_encoder", tmp_path / "config.json", (), ())
        assert field in ("vocab_size", "layers") and pytest.skip("the library takes it; loading weights will not")


def test_a_pipeline_folder_that_is_run_as_it_is_runs_no_code(trapped):
    scheduler = trapped / "scheduler/scheduler_config.json"
    scheduler.write_text((DIGITS / "tiny/scheduler/scheduler_config.json").read_text())
    call = dict(seed=1, steps=1, output_type="np")
    with pytest.warns(Notice, match="would load code"), accel.load(trapped, "eager") as pipeline:
        drawn = pipeline("a seven", **call).images
    with accel.load(DIGITS / "tiny", "eager") as plain:
        assert (plain("a seven", **call).images == drawn).all()


@pytest.mark.parametrize(
    "part, field, value",
    [("text_encoder", "num_attention_heads", 0), ("text_encoder", "hidden_act", "nothing_like_it"),
     ("text_encoder", "vocab_size", -1), ("text_encoder", "intermediate_size", "x"),
     ("unet", "block_out_channels", []), ("unet", "block_out_channels", ["x"]), ("unet", "sample_size", []),
     ("unet", "sample_size", 10**6), ("unet", "cross_attention_dim", -4), ("unet", "down_block_types", ["os.system"]),
     ("vae", "latent_channels", True), ("vae", "latent_channels", 10**6), ("vae", "block_out_channels", [32] * 300),
     ("vae", "scaling_factor", "x"), ("vae", "scaling_factor", 0)],
)  # fmt: skip
def test_an_absurd_config_of_a_pipeline_folder_is_a_sentence_at_once(tmp_path, part, field, value):
    config = shutil.copytree(DIGITS / "tiny", tmp_path / "model") / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError, match="get the file"):
        open_pipeline(tmp_path / "model")


def test_shards_that_lie_elsewhere_are_refused(trapped):
    name = "diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../../secret.safetensors"}}
    (trapped / "unet" / f"{name}.index.json").write_text(json.dumps(index))
    with pytest.warns(Notice), pytest.raises(UserError, match="no file beside it"):
        open_source(trapped).load("unet")


def test_a_pipe_or_device_in_a_folder_is_refused_at_once(trapped):
    os.mkfifo(trapped / "tokenizer/special_tokens_map.json")
    with pytest.raises(UserError, match="not an ordinary file"):
        clip_tokenizer(trapped / "tokenizer")
    (trapped / "vae/extra.json").symlink_to("/dev/zero")
    with pytest.warns(Notice), pytest.raises(UserError, match="not an ordinary file"):
        open_source(trapped).load("vae")


def test_code_fields_are_found_at_any_depth():
    config = {"a": 1, "text_config": {"auto_map": {}, "b": 2, "attn_implementation": "sdpa"}, "use_kernels": True}
    assert stripped(config) == ({"a": 1, "text_config": {"b": 2}}, ["text_config.auto_map", "use_kernels"])
