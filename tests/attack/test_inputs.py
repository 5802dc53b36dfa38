"""Tokenizers, LoRA files, shards, captions and caches from a stranger: bounded, and a sentence where they are wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accel.assets import DIGITS
from accel.bench import check_schema
from accel.cli import main
from accel.distill.data.cache import open_cache
from accel.distill.settings import LoraRecipe
from accel.distill.sources.item import BrokenItem
from accel.distill.sources.open_data import open_data
from accel.distill.watching.card import card
from accel.errors import UserError, markdown
from accel.models.lora import LoraFile, read
from accel.sampling import Sampling
from accel.sampling.noise_schedule import NoiseSchedule
from accel.sampling.samplers import table
from accel.sampling.scheduler_config import CLASSES
from accel.text.tokenizer import ClipTokenizer

TOKENIZER = DIGITS / "tiny-1step-int8/tokenizer"


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    data = change(data) or data
    path.write_text(json.dumps(data))


def step(key: str, *steps: dict):
    lists = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}

    def change(data):
        data[key] = {"type": "Sequence", lists[key]: list(steps)}

    return change


GROW = {"type": "Replace", "pattern": {"String": "e"}, "content": "eeeeeeeeee"}
SLOW = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed", "invert": False}
UNUSUAL = {
    "text that grows": step("normalizer", *[GROW] * 8),
    "text that grows, one step": lambda data: data.update(normalizer=GROW),
    "text that grows by spaces": step(
        "normalizer", {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " " * 10_000}
    ),
    "a prefix of any length": step("normalizer", {"type": "Prepend", "prepend": "x" * 1000}),
    "an expression without end": step("pre_tokenizer", SLOW),
    "many steps": step("normalizer", *[{"type": "NFC"}] * 1000),
    "steps within steps": step("normalizer", {"type": "Sequence", "normalizers": [GROW]}),
    "a step that is text": lambda data: data.update(normalizer="NFC"),
    "steps that are no list": lambda data: data.update(normalizer={"type": "Sequence", "normalizers": {"a": 1}}),
    "a step without a type": step("normalizer", {"pattern": 1}),
}


@pytest.mark.parametrize("attack", UNUSUAL)
def test_a_tokenizer_with_steps_that_clip_has_not_is_refused_at_once(tokenizer, attack):
    edit(tokenizer / "tokenizer.json", UNUSUAL[attack])
    started = time.monotonic()
    with pytest.raises(UserError, match="tokenizer.json"):
        ClipTokenizer.from_folder(tokenizer).encode("a" * 60 + "!e")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("value", [7, [], [1], {"content": 3}, {"x": 1}, True, "nothing like it", "\ud800"])
@pytest.mark.parametrize("field", ["bos_token", "eos_token", "pad_token", "added_tokens_decoder", "model_max_length"])
def test_a_field_of_a_tokenizer_of_another_type_is_a_sentence_or_harmless(tokenizer, field, value):
    edit(tokenizer / "tokenizer_config.json", lambda data: data | {field: value})
    try:
        ids, _ = ClipTokenizer.from_folder(tokenizer).encode("a seven")
        assert len(ids) <= 4096
    except UserError as error:
        assert "\n" not in error.message


def test_an_honest_tokenizer_is_read_from_both_of_its_forms(tokenizer):
    wanted = ClipTokenizer.from_folder(tokenizer)("a handwritten seven")
    (tokenizer / "tokenizer.json").unlink()
    assert (ClipTokenizer.from_folder(tokenizer)("a handwritten seven") == wanted).all()


def lora(path: Path, tensors: dict | None = None, settings=None) -> LoraFile:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = tensors or {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(tensors, path, metadata=None if settings is None else {"lora_adapter_metadata": text})
    return LoraFile(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"unet.lora_alpha": "x"},
        {"unet.lora_alpha": [1]},
        {"unet.lora_alpha": 1e300},
        {"unet.alpha_pattern": [1]},
        {"unet.alpha_pattern": {"(a+)+$": 1}},
        {"unet.alpha_pattern": {"to_q": "x"}},
    ],
)
def test_settings_in_a_lora_that_are_no_settings_are_a_sentence(tmp_path, settings):
    with pytest.raises(UserError, match="alpha"):
        read(lora(tmp_path / "x.safetensors", settings=settings))


@pytest.mark.parametrize("settings", ["[]", "7", "not JSON", "[" * 5000, '{"x":' * 50 + "1" + "}" * 50])
def test_metadata_that_is_none_is_no_metadata(tmp_path, settings):
    (updates,) = read(lora(tmp_path / "x.safetensors", settings=settings)).values()
    assert [update.factor for update in updates.values()] == [1.0]


@pytest.mark.parametrize("shapes", [((0, 8), (8, 0)), ((2,), (8,)), ((2, 8, 1), (8, 2, 1)), ((), ())])
def test_a_lora_without_a_rank_is_a_sentence(tmp_path, shapes):
    down, up = map(torch.ones, shapes)
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = lora(tmp_path / "x.safetensors", {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    with pytest.raises(UserError, match="incomplete"):
        read(file)


def test_a_shard_with_members_of_any_size_or_depth_costs_nothing(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("1.txt", b"a cat"), ("2.json", b"[" * 100_000), ("../../3.txt", b"x"), ("2.txt", b"b")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        large = tarfile.TarInfo("1.png")
        large.size = 1 << 40
        tar.addfile(large)
    started = time.monotonic()
    source = open_data(path)
    for row in range(len(source)):
        with pytest.raises(BrokenItem):
            source[row]
    assert time.monotonic() - started < 5 and not (tmp_path.parent / "3.txt").exists()


def test_a_caption_that_is_a_pipe_is_a_broken_row(tmp_path, six_images):
    folder = Path(shutil.copytree(six_images, tmp_path / "data"))
    (folder / "metadata.jsonl").unlink()
    (folder / "0.txt").write_text("a cat")
    os.mkfifo(folder / "1.txt")
    with pytest.raises(BrokenItem, match="not an ordinary file"):
        open_data(folder)[1]


@pytest.mark.parametrize("steps", [10**12, 10**400, 0, -1, "x", 1.5, True])
def test_a_schedule_of_any_length_is_refused(steps):
    with pytest.raises(UserError, match="num_train_timesteps"):
        NoiseSchedule.from_config({"num_train_timesteps": steps})


ODD = [True, 10**6, 10**400, 1e300, float("nan"), float("inf"), "x", "", [], [[]], {}, {"a": 1}, -1, 5e-324]


@pytest.mark.parametrize("scheduler", CLASSES)
def test_an_odd_value_in_any_field_of_a_scheduler_is_a_sentence_or_a_table(scheduler):
    for field, value in itertools.product([*CLASSES[scheduler], "_class_name"], ODD):
        try:
            schedule = NoiseSchedule.from_scheduler({"_class_name": scheduler, field: value})
        except UserError:
            continue
        for name in ("ddim", "lcm", "dpmpp_2m", "euler"):
            with contextlib.suppress(UserError):
                table(name, schedule, 3)


@pytest.mark.parametrize("name, right, wrong", [("eta", 0.5, "x"), ("shift", 3, "x"), ("sigmas", "karras", 1)])
def test_a_sampler_option_of_another_type_is_refused_where_it_is_read(name, right, wrong):
    Sampling(sampler="ddim", guidance=0.0, steps=1, options={name: right})
    for value in (wrong, True, [], {}, float("nan"), float("inf"), 10**400):
        with pytest.raises(UserError, match=f"invalid {name}"):
            Sampling.from_dict({"name": "ddim", "guidance": 0, "steps": 1, "options": {name: value}}, "the manifest")


def test_guidance_has_a_size_that_numbers_have():
    with pytest.raises(UserError, match="guidance"):
        Sampling(sampler="ddim", guidance=10**400, steps=1)


INDEXES = [
    [],
    {"key": []},
    {"key": {"format": 1}},
    {"key": {"format": 1, "variants": 0, "shard": 0, "dtype": "x"}, "files": {}, "broken": {}},
    {"key": {"format": 1, "variants": 1, "shard": 2, "dtype": "x"}, "files": {"../../x": {}}, "broken": {}},
    {
        "key": {"format": 1, "variants": 1, "shard": 2, "dtype": "x"},
        "files": {"../../x": {"sha256": "0", "bytes": 0}},
        "broken": {},
    },
    {"key": {"format": 1, "variants": 1, "shard": 2, "dtype": "x"}, "files": {}, "broken": {}},
]


@pytest.mark.parametrize("index", INDEXES)
def test_a_cache_of_another_shape_is_a_sentence(tmp_path, index):
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        open_cache(tmp_path)


@pytest.mark.parametrize("field", ["rows", "bundle", "work", "environment", "notes", "noise_floor"])
@pytest.mark.parametrize("value", [None, 7, [7], {"x": 1}, [{"variant": "<script>"}]])
def test_a_saved_benchmark_of_another_shape_is_a_sentence(tmp_path, capsys, field, value):
    data = json.loads((Path(__file__).parents[2] / "benchmarks/digits.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(data | {field: value}))
    code = main(["bench", "--from", str(tmp_path / "x.json")])
    said = capsys.readouterr().err
    assert "Traceback" not in said and (code == 0 or said.startswith("error: "))
    harmless = field in ("notes", "noise_floor", "environment") and value is not None
    assert code == 1 or harmless


def test_a_saved_benchmark_reaches_no_terminal_raw():
    shown = check_schema({"schema": "accel-bench/1", "rows": [{"variant": "x\x1b[2J"}]}, "x")
    assert shown["rows"][0]["variant"] == r"x\x1b[2J"


def test_words_of_a_card_are_words(tmp_path):
    assert markdown("<script>[a](b)\n# `x`\x1b|") == r"\<script\>\[a\]\(b\) \# \`x\`\\x1b\|"
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    recipe = LoraRecipe(model="a`; <b>$(x)", data="<i>`rm`", sample_prompts="```\nrm")
    record = dict(steps=1, images=1, seconds_per_step=1.0, processes=1, device="<u>`")
    text = card(tmp_path, record, recipe, ['{"loss": 1.0, "<s>`": 1.0}'], sdxl=False, samples=True)
    before, code, after = text.split("```")
    assert "pipe.load_lora_weights" in code and "accel export" in after
    for part in (before, after):
        outside = re.sub(r"(?<!\\)`[^`]*`", "", part)
        assert "\\<" in outside and not re.search(r"(?<!\\)<", outside), part
