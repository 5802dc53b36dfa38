"""Files of textual inversion: every kind is read as diffusers reads it, and what does not fit is refused with a fix."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from accel.errors import UserError
from accel.models.embeddings import embedding_file, embedding_files, fitting
from accel.models.embeddings.reading import check_tokens

ONE, TWO = {"text_encoder": 8}, {"text_encoder": 8, "text_encoder_2": 12}
VECTORS = torch.arange(24.0).reshape(3, 8)


def saved(folder, name, state):
    path = folder / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def a1111(tensor, **more):
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": tensor}, "step": 500, "sd_checkpoint": None} | more


@pytest.mark.parametrize(
    ("name", "state", "token"),
    [
        ("learned_embeds.safetensors", {"<toy>": VECTORS}, "<toy>"),
        ("learned_embeds.bin", {"<toy>": VECTORS}, "<toy>"),
        ("style.pt", a1111(VECTORS, name="my style"), "my style"),
        ("style.pt", a1111(torch.nn.Parameter(VECTORS), name=None), "style"),
        ("style.pt", a1111(VECTORS), "style"),
        ("style.safetensors", {"emb_params": VECTORS}, "style"),
        ("half.safetensors", {"emb_params": VECTORS.half()}, "half"),
        ("brain.safetensors", {"emb_params": VECTORS.bfloat16()}, "brain"),
        ("half.bin", {"h": VECTORS.half()}, "h"),
    ],
)
def test_each_kind(tmp_path, name, state, token):
    path = saved(tmp_path, name, state)
    (made,) = fitting(str(path), ONE)
    assert made.token == token and made.tokens == (token, f"{token}_1", f"{token}_2")
    assert made.vectors["text_encoder"].dtype == np.float32
    assert np.array_equal(made.vectors["text_encoder"], VECTORS.numpy())
    (named,) = fitting([f"{path}=<mine>"], ONE)
    assert named.token == "<mine>" and (named.record()["token"], named.record()["vectors"]) == ("<mine>", 3)
    assert fitting([(path, "<mine>")], ONE)[0].token == "<mine>"


def test_a_single_vector_of_one_dimension(tmp_path):
    (made,) = fitting(saved(tmp_path, "a.safetensors", {"<dot>": VECTORS[1]}), ONE)
    assert made.tokens == ("<dot>",) and made.vectors["text_encoder"].tolist() == [VECTORS[1].tolist()]


def test_sdxl(tmp_path):
    state = {"clip_g": torch.ones(2, 12), "clip_l": torch.zeros(2, 8)}
    (made,) = fitting(saved(tmp_path, "xl.safetensors", state), TWO)
    assert made.token == "xl" and {name: v.shape for name, v in made.vectors.items()} == {
        "text_encoder": (2, 8),
        "text_encoder_2": (2, 12),
    }


def test_sdxls_refiner_has_the_second_text_encoder_alone(tmp_path):
    state = {"clip_g": torch.ones(2, 12), "clip_l": torch.zeros(2, 8)}
    (made,) = fitting(saved(tmp_path, "xl.safetensors", state), {"text_encoder_2": 12})
    assert list(made.vectors) == ["text_encoder_2"] and (made.vectors["text_encoder_2"] == 1).all()


def test_a_folder_of_diffusers_and_a_name_with_an_equals_sign(tmp_path):
    saved(tmp_path, "learned_embeds.safetensors", {"<toy>": VECTORS})
    assert fitting(tmp_path, ONE)[0].token == "<toy>"
    odd = saved(tmp_path, "a=b.safetensors", {"<toy>": VECTORS})
    assert embedding_file(odd).token is None and embedding_file(f"{odd}=<x=y>").token == "<x=y>"
    assert embedding_files(None) == embedding_files([]) == ()


def nothing(path):
    path.write_bytes(b"")


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("name", "state", "widths", "text"),
    [
        ("a.safetensors", {"x": torch.ones(3, 5)}, ONE, "has vectors of 5 numbers.*takes 8"),
        ("a.safetensors", {"x": torch.ones(2, 1024)}, ONE, r"1024 numbers \(it is made for SD2"),
        ("a.safetensors", {"x": VECTORS, "y": VECTORS + 1}, ONE, "it holds 2 entries"),
        ("a.safetensors", {"x": VECTORS * torch.nan}, ONE, "NaN or infinite"),
        ("a.bin", {"x": VECTORS * torch.inf}, ONE, "NaN or infinite"),
        ("a.safetensors", {"x": torch.ones(76, 8)}, ONE, "76 vectors"),
        ("a.safetensors", {"x": torch.ones(1, 1, 8)}, ONE, "not the shape of token vectors"),
        ("a.safetensors", {"x": torch.ones(0, 8)}, ONE, "not the shape of token vectors"),
        ("a.bin", {"x": torch.tensor(1.0)}, ONE, "not the shape of token vectors"),
        ("a.bin", {"x": torch.ones(2, 8, dtype=torch.int64)}, ONE, "not vectors of numbers"),
        ("a.bin", {"x": torch.ones(1).expand(10**9, 8)}, ONE, "1,000,000,000 vectors"),
        ("a.bin", {"x": "text"}, ONE, "holds a str"),
        ("a.bin", {"x": Evil()}, ONE, "more than weights"),
        ("a.bin", torch.ones(2, 8), ONE, "does not hold a dictionary"),
        ("a.pt", {"string_to_param": {}, "name": "x"}, ONE, "does not hold one tensor"),
        ("a.pt", {"string_to_param": 3}, ONE, "does not hold one tensor"),
        ("a.safetensors", {"": VECTORS}, ONE, "cannot be a token"),
        ("a.safetensors", {" x": VECTORS}, ONE, "begins or ends with a space"),
        ("a.safetensors", {"a\nb": VECTORS}, ONE, "cannot be a token"),
        ("a.txt", {"x": VECTORS}, ONE, "is not an embedding file"),
        ("a.safetensors", {"x": VECTORS}, TWO, "for one text encoder.*this SDXL model has 2"),
        ("a.safetensors", {"clip_l": VECTORS, "clip_g": torch.ones(3, 12)}, ONE, "is made for SDXL"),
        ("a.safetensors", {"clip_l": VECTORS}, TWO, "has clip_l without clip_g"),
        ("a.safetensors", {"clip_l": VECTORS, "clip_g": torch.ones(2, 12)}, TWO, "unequal numbers of vectors"),
        (
            "a.safetensors",
            {"clip_l": VECTORS, "clip_g": torch.ones(3, 8)},
            TWO,
            "text_encoder_2 of this model takes 12",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, state, widths, text):
    path = saved(tmp_path, name, state)
    with pytest.raises(UserError, match=text) as error:
        fitting(path, widths)
    assert error.value.fix


@pytest.mark.parametrize("spec", [3, ["a.pt", "b", "c"], [("a.pt",)], [(3, "x")], "missing.pt=<x>", "missing.pt"])
def test_what_is_no_file_is_refused(spec):
    with pytest.raises(UserError, match="invalid embedding|no such embedding file"):
        fitting(spec, ONE)


def test_files_of_absurd_size_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.models.weight_files.read_pickle", pytest.fail)
    monkeypatch.setattr("accel.models.weight_files.arrays", pytest.fail)
    for name in ("large.safetensors", "large.pt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(65 << 20)
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(65 << 20))
    assert (tmp_path / "packed.pt").stat().st_size < 1 << 20
    for name in ("large.safetensors", "large.pt", "packed.pt"):
        with pytest.raises(UserError, match="too many for an embedding"):
            fitting(tmp_path / name, ONE)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", pickle.dumps([1], 2), b"\x80\x02}q\x00."])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_damaged_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError):
        fitting(tmp_path / name, ONE)


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ([("cat", 1)], "has a token 'cat' already"),
        ([("<old>", 1)], "has a token '<old>' already"),
        ([("dog", 2)], "has a token 'dog_1' already"),
        ([("dog", 1)], "has a token 'dog_1' already"),
        ([("<a>", 1), ("<a>", 1)], "has a token '<a>' already"),
        ([("<a>", 2), ("<a>_1", 1)], "has a token '<a>_1' already"),
        ([("<a>_1", 1), ("<a>", 1)], "has a token '<a>_1' already"),
        ([("<A>", 1), ("<a>", 1)], "'<a>' and another learned token are the same in lower case"),
        ([("<OLD>", 1)], "the same in lower case"),
    ],
)
def test_tokens_that_are_there_already(tmp_path, tokens, text):
    made = []
    for i, (token, count) in enumerate(tokens):
        path = saved(tmp_path, f"{i}.safetensors", {"x": VECTORS[:count]})
        made += fitting([(path, token)], ONE)
    with pytest.raises(UserError, match=text) as error:
        check_tokens(made, ["cat", "<old>", "dog_1"], ["<old>"])
    assert f"{made[-1].file.path}=<" in error.value.fix
    check_tokens(made[:-1], ["cat"], [])
