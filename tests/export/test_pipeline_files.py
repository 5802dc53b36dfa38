"""Tokenizers leave an export in both forms, whichever they came in."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from accel.export.pipeline_files import complete_tokenizer
from accel.text.tokenizer import ClipTokenizer

PROMPTS = ["the cat", "A Dog, the dog's!", "", "naïve café  99", "🦊 " * 50]


def test_one_form_becomes_both_and_both_give_the_same_ids(sd15, tmp_path):
    only_json = shutil.copytree(sd15 / "tokenizer", tmp_path / "json")
    expected = ClipTokenizer.from_folder(only_json)(PROMPTS)
    complete_tokenizer(only_json)
    (only_json / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert np.array_equal(ClipTokenizer.from_folder(only_json)(PROMPTS), expected)

    complete_tokenizer(only_json)  # now from vocab.json and merges.txt alone
    (only_json / "vocab.json").unlink()
    assert np.array_equal(ClipTokenizer.from_folder(only_json)(PROMPTS), expected)


def test_a_complete_folder_is_left_alone(sd15, tmp_path):
    folder = shutil.copytree(sd15 / "tokenizer", tmp_path / "t")
    complete_tokenizer(folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    complete_tokenizer(folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_the_bundle_has_both_and_plain_tokenizers_reads_them(sd15_bundle):
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer

    folder = sd15_bundle / "tokenizer"
    assert (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    plain = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the cat").ids
    assert plain == ClipTokenizer.from_folder(folder)(["the cat"])[0][: len(plain)].tolist()
