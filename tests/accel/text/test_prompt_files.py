"""Files of prompts: every format gives the same list, and what cannot be used is named with its line."""

from __future__ import annotations

import pytest

from accel.errors import UserError
from accel.text.prompt_files import read_prompts


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.csv", "file_name,text\n1.jpg,a cat\n2.jpg,a dog\n", ["a cat", "a dog"]),
        ("a.csv", "id,caption,split\n1, a cat ,val\n", ["a cat"]),
        ("a.csv", "image,whatever\n1.jpg,a cat\n\n", ["a cat"]),
        ("a.csv", '\ufefftext\n"a cat,\nand ""a"" dog"\n', ['a cat,\nand "a" dog']),
        ("a.txt", "a cat, red\na dog\n", ["a cat, red", "a dog"]),
        ("prompts", "a cat\n", ["a cat"]),
        ("a.jsonl", '{"file_name": "1.png", "text": "a cat"}\n\n{"prompt": "a dog"}\n', ["a cat", "a dog"]),
    ],
)
def test_prompts_are_read(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_prompts(tmp_path / name) == read_prompts(tmp_path / name, refuse_blank=True) == prompts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"file_name,text\n1.jpg,a cat\n2.jpg,\n", "line 3: the prompt is empty"),
        ("a.csv", b"file_name,text\n1.jpg\n", "line 2"),
        ("a.csv", b"", "no column"),
        ("a.csv", b"x\ny\n", "no column"),
        ("a.txt", b"a cat\n\na dog\n", "line 2"),
        ("a.txt", b"", "no prompts in it"),
        ("a.csv", b"a,text\n1,\xff\n", "UTF-8"),
        ("a.jsonl", b'{"text": "a cat"}\n{"text": 5}\n', "line 2 of .* no text, prompt or caption"),
    ],
)
def test_files_that_cannot_be_used_name_the_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / name, refuse_blank=True)


def test_empty_lines_are_left_out_unless_they_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\n  \na dog\n")
    assert read_prompts(tmp_path / "a.txt") == ["a cat", "a dog"]
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no prompts in it"):
        read_prompts(tmp_path / "a.txt")
