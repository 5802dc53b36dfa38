"""The tokenizer against transformers' CLIPTokenizer on a made vocabulary, read from both ways of storing it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from accel.errors import UserError
from accel.text.tokenizer import ClipTokenizer

MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o</w>"),
    ("w", "o"),
    ("r", "l"),
    ("wo", "rl"),
    ("worl", "d</w>"),
    ("t", "he</w>"),
    ("h", "e</w>"),
    ("a", "n"),
    ("an", "d</w>"),
    ("'", "s</w>"),
    ("Ã", "©"),
    (".", ".</w>"),
    ("s", "e"),
    ("se", "v"),
    ("sev", "en</w>"),
    ("e", "n</w>"),
    ("#", "#"),
]

PROMPTS = [
    "",
    " ",
    "hello world",
    "Hello   World",
    "  hello\t\nworld  ",
    "a handwritten seven",
    "the he and hello",
    "it's we're I'll don't he'd I've I'm",
    "it's! the 'quoted' word...",
    "café cafe\u0301 CAFÉ",
    "Ünïcödé straße ΑΒΓ İ",
    "日本語の絵",
    "עברית",
    "العربية",
    "🙂🙃 hello 👩‍👩‍👧 🇩🇪",
    "a1b22c333 2024",
    "!!! hello! !",
    "##hash # tag",
    "(best:1.2), [x] {y} _z_",
    "<|endoftext|> hello",
    "hello<|startoftext|>world",
    "<|EndOfText|>",
    "a\u00a0b\u3000c\u200bd",
    "\x00\x01 control",
    "ﬁ ½ ²",
    "hello " * 75,
    "hello " * 76,
    "hello " * 200,
    "🙂" * 60,
    "x" * 500,
    "the " * 74 + "worlds",
]


def vocabulary():
    vocab = {}
    letters = sorted(ByteLevel.alphabet(), key=lambda c: (c != "!", c))
    for token in [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in MERGES)]:
        vocab.setdefault(token, len(vocab))
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return vocab


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"])
def pad(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(pad):
    merges = [m for m in MERGES if m[0] in vocabulary() and m[1] in vocabulary()]
    return CLIPTokenizer(vocab=vocabulary(), merges=merges, pad_token=pad, model_max_length=77)


def write_plain(folder, merges=MERGES, **config):
    """As transformers 4 wrote it: vocab.json, merges.txt and two configs, one with tokens as mappings."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = [f"{a} {b}" for a, b in merges if a in vocab and b in vocab]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    bos = {"content": "<|startoftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": bos, "eos_token": bos | {"content": "<|endoftext|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special | {"pad_token": config.get("pad_token")}))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["tokenizer.json", "plain", "plain, flags", "plain, list"])
def pair(request, theirs, pad, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "tokenizer.json":
        theirs.save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
        return ClipTokenizer.from_folder(folder), theirs
    write_plain(folder, pad_token=pad)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    if request.param == "plain, flags":
        config["bos_token"] = flags | {"__type": "AddedToken", "content": "<|startoftext|>"}
        config["eos_token"] = config["unk_token"] = flags | {"__type": "AddedToken", "content": "<|endoftext|>"}
    if request.param == "plain, list":
        ids = vocabulary()
        listed = {t: flags | {"content": t, "special": True} for t in ("<|startoftext|>", "<|endoftext|>")}
        config["added_tokens_decoder"] = {str(ids[t]): token for t, token in listed.items()}
        config |= {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ClipTokenizer.from_folder(folder), CLIPTokenizer.from_pretrained(folder)


def reference(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: ascii(p[:20]))
def test_ids_equal_transformers(pair, prompt):
    ours, theirs = pair
    assert ours([prompt])[0].tolist() == reference(theirs, [prompt])[0].tolist()


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=120))
def test_any_text_equals_transformers(pair, text):
    ours, theirs = pair
    ids, dropped = ours.encode(text)
    assert ids.tolist() == reference(theirs, [text])[0].tolist()
    assert text.endswith(dropped)


def test_batch(pair):
    ours, theirs = pair
    ids = ours(PROMPTS)
    assert ids.dtype == np.int64 and ids.shape == (len(PROMPTS), 77)
    assert (ids == reference(theirs, PROMPTS)).all()
    assert (ours("hello world") == ours(["hello world"])).all()
    assert ours([]).shape == (0, 77)


def test_merges_are_used(tmp_path):
    """The vocabulary is not so poor that everything above is bytes."""
    ours = ClipTokenizer.from_folder(write_plain(tmp_path))
    vocab = vocabulary()
    assert ours.encode("Hello  WORLD")[0][:4].tolist() == [ours.bos, vocab["hello</w>"], vocab["world</w>"], ours.eos]


def test_dropped_text_is_returned(tmp_path):
    ours = ClipTokenizer.from_folder(write_plain(tmp_path))
    assert ours.encode("hello " * 75)[1] == ""
    assert ours.encode("hello " * 75 + "The  World, it's gone")[1] == "The  World, it's gone"
    ids, dropped = ours.encode("hello " * 73 + "e\u0301 and Hello 🙂")
    assert dropped == "and Hello 🙂" and len(ids) == 77 and ids[-1] == ours.eos
    assert "x" * 80 == "x" * 75 + ours.encode("x" * 80)[1]


def test_defaults_without_configs(tmp_path):
    write_plain(tmp_path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    ours = ClipTokenizer.from_folder(tmp_path)
    assert ours.length == 77 and ours.pad == ours.eos


@pytest.mark.parametrize("written, length", [(16, 16), (10**30, 77), (1e30, 77)])
def test_length(tmp_path, written, length):
    ours = ClipTokenizer.from_folder(write_plain(tmp_path, model_max_length=written))
    ids, dropped = ours.encode("hello " * 20)
    assert ids.shape == (length,) and dropped == ("hello " * 6 if length == 16 else "")


def test_stored_truncation_and_padding_do_not_interfere(theirs, tmp_path):
    theirs("hello", padding="max_length", truncation=True, max_length=5)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    ids, dropped = ClipTokenizer.from_folder(tmp_path).encode("hello " * 30)
    assert (ids == vocabulary()["hello</w>"]).sum() == 30 and dropped == ""


DAMAGE = {
    "vocab.json": [None, "{", "[]", '{"a": "b"}', "{}", b"\xff\xfe"],
    "merges.txt": [None, "#version: 0.2\na b c\n", "nothere </w>\n", b"\xff\xfe"],
    "tokenizer_config.json": ["{", '"x"', '{"model_max_length": "many"}', '{"model_max_length": 0}'],
    "special_tokens_map.json": ["{"],
}


@pytest.mark.parametrize("name, content", [(n, c) for n, cs in DAMAGE.items() for c in cs])
def test_damage_names_the_file(tmp_path, name, content):
    write_plain(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=name) as error:
        ClipTokenizer.from_folder(tmp_path)
    assert error.value.fix


WORDS = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}'


@pytest.mark.parametrize("content", ["{", "{}", WORDS])
def test_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        ClipTokenizer.from_folder(tmp_path)


def test_missing_folder_and_unknown_padding(tmp_path):
    with pytest.raises(UserError, match=r"vocab\.json is missing"):
        ClipTokenizer.from_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="pad_token '<pad>'"):
        ClipTokenizer.from_folder(write_plain(tmp_path, pad_token="<pad>"))


def test_a_prompt_is_text(tmp_path):
    ours = ClipTokenizer.from_folder(write_plain(tmp_path))
    with pytest.raises(UserError, match="NoneType"):
        ours(["hello", None])


def test_imports_no_transformers():
    code = "import sys, accel.text.tokenizer\nassert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
