"""Every way to hand over training images, whole and broken, on real small files."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from accel.distill.sources import digits
from accel.distill.sources.hf_datasets import _source
from accel.distill.sources.open_data import BrokenItem, open_data
from accel.errors import Notice, UserError

datasets = pytest.importorskip("datasets")


def an_image(number: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def encoded(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    an_image(number).save(file, kind)
    return file.getvalue()


def write(path, content: bytes | str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def metadata(folder, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return write(folder / "metadata.jsonl", text)


def seen(source) -> list[tuple]:
    """(name, captions, the number of the image) of every row."""
    found = []
    for row in range(len(source)):
        item = source[row]
        assert item.image.mode == "RGB" and item.captions == source.captions(row)
        numbers = [n for n in range(10) if np.array_equal(np.asarray(item.image), np.asarray(an_image(n)))]
        found.append((item.name, item.captions, *numbers))
    return found


def reason(source, row: int) -> str:
    with pytest.raises(BrokenItem) as caught:
        source[row]
    again = pickle.loads(pickle.dumps(caught.value))  # it has to get out of a worker process
    assert (again.name, again.reason) == (caught.value.name, caught.value.reason)
    assert caught.value.name and caught.value.reason
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ folder


def test_captions_pair_by_file_name_and_not_by_position(tmp_path):
    for number in (0, 1, 2):
        write(tmp_path / f"part/{number}.png", encoded(number))
    metadata(
        tmp_path, {"text": "two", "file_name": "part/2.png"}, "", {"file_name": "part/0.png", "text": " nought\n zero "}
    )
    source = open_data(tmp_path)
    assert seen(source) == [("part/2.png", ("two",), 2), ("part/0.png", ("nought zero",), 0)]


def test_a_list_of_captions_and_rows_that_share_an_image(tmp_path):
    write(tmp_path / "a.png", encoded(1))
    metadata(tmp_path, {"file_name": "a.png", "captions": ["one", "", "uno"]}, {"file_name": "a.png", "captions": "I"})
    assert seen(open_data(tmp_path)) == [("a.png", ("one", "uno"), 1), ("a.png", ("I",), 1)]


def test_csv_metadata_has_quotes_commas_and_newlines(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.png", encoded(number))
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerows([["file_name", "caption"], ["1.png", 'a "fox", red'], ["0.png", "two\nlines"], ["2.png", "ü"]])
    assert seen(open_data(tmp_path)) == [
        ("1.png", ('a "fox", red',), 1),
        ("0.png", ("two lines",), 0),
        ("2.png", ("ü",), 2),
    ]


def test_rows_of_a_csv_that_are_broken(tmp_path):
    for number in range(4):
        write(tmp_path / f"{number}.png", encoded(number))
    write(tmp_path / "metadata.csv", b"file_name,text\n0.png,a cat, on a mat\n1.png\n2.png,caf\xe9\n3.png,three\n,x\n")
    source = open_data(tmp_path)
    assert "0.png: its line has more values than columns" in reason(source, 0)
    assert "1.png: it has no caption" in reason(source, 1)
    assert "2.png: its caption is not UTF-8" in reason(source, 2)
    assert source[3].captions == ("three",)
    assert "metadata.csv line 5: it has no file_name" in reason(source, 4)


def test_captions_beside_images_in_subfolders(tmp_path):
    write(tmp_path / "b/x.PNG", encoded(1))
    write(tmp_path / "b/x.txt", "\ufeffone\r\nline two\n")
    write(tmp_path / "a.jpeg", encoded(2))
    write(tmp_path / "a.txt", "two")
    write(tmp_path / "c.webp", encoded(3))
    write(tmp_path / "._a.jpeg", b"what another system leaves behind")
    write(tmp_path / "notes.md", "no image")
    (tmp_path / "b/loop").symlink_to(tmp_path)
    source = open_data(tmp_path)
    assert len(source) == 3
    assert [source[row].name for row in (0, 1)] == ["a.jpeg", "b/x.PNG"]
    assert source[1].captions == ("one line two",)
    assert "c.webp: its caption c.txt cannot be read: No such file" in reason(source, 2)


def test_the_split_folder_is_found(tmp_path):
    write(tmp_path / "train/1.png", encoded(1))
    metadata(tmp_path / "train", {"file_name": "1.png", "text": "one"})
    assert seen(open_data(tmp_path)) == [("1.png", ("one",), 1)]


def test_everything_that_makes_a_row_unusable(tmp_path):
    whole = encoded(1)
    cases = {
        "cut.png": (whole[: len(whole) // 2], "x", "cannot be decoded"),
        "cut.jpg": (encoded(1, "JPEG")[:300], "x", "cannot be decoded"),
        "text.png": (b"<html>404</html>", "x", "not an image"),
        "empty.png": (b"", "x", "the file is empty"),
        "gone.png": (None, "x", "No such file"),
        "blank.png": (whole, " \n ", "its caption is empty"),
        "none.png": (whole, None, "it has no caption"),
        "number.png": (whole, 7.5, "its caption is not text: 7.5"),
        "list.png": (whole, ["a", 1], "its caption is not text"),
        "half.png": (whole, "\ud83d", "its caption is not UTF-8"),
        "../outside.png": (None, "x", "it points outside the folder"),
        "/etc/outside.png": (None, "x", "it points outside the folder"),
        "nul\0.png": (None, "x", "it points outside the folder"),
        "folder.d": (None, "x", "Is a directory"),
    }
    (tmp_path / "folder.d").mkdir()
    for name, (content, _, _) in cases.items():
        if content is not None:
            write(tmp_path / name, content)
    write(tmp_path / "good.png", whole)
    lines = [json.dumps({"file_name": name, "text": text}).encode() for name, (_, text, _) in cases.items()]
    lines += [b'{"file_name": "good.png", "text": "caf\xe9"}', b"{not json", b"[1]", b'{"text": "x"}']
    write(tmp_path / "metadata.jsonl", b"\n".join([*lines, b'{"file_name": "good.png", "text": "good"}']))
    source = open_data(tmp_path)
    for row, (name, (_, _, why)) in enumerate(cases.items()):
        assert reason(source, row).startswith(f"{name}: ") and why in reason(source, row)
    count = len(cases)
    assert reason(source, count) == f"metadata.jsonl line {count + 1}: it is not UTF-8"
    assert f"metadata.jsonl line {count + 2}: it is not JSON" in reason(source, count + 1)
    assert "it has no file_name" in reason(source, count + 2) and "it has no file_name" in reason(source, count + 3)
    assert source[count + 4].captions == ("good",)
    assert len(source.identity) == 64


def test_columns_are_guessed_only_when_one_can_be_meant(tmp_path):
    write(tmp_path / "1.png", encoded(1))
    row = {"file_name": "1.png", "url": "http://x", "generated_caption": "new", "width": 16}
    metadata(tmp_path, row)
    assert open_data(tmp_path)[0].captions == ("new",)
    assert open_data(tmp_path, image_column="", caption_column="")[0].captions == ("new",)
    metadata(tmp_path, row | {"text": "old"})
    with pytest.raises(UserError, match="several may hold the captions: generated_caption, text") as caught:
        open_data(tmp_path)
    assert "--caption-column generated_caption" in caught.value.fix
    assert open_data(tmp_path, caption_column="text")[0].captions == ("old",)
    with pytest.raises(UserError, match="no column 'txt'; it has url, generated_caption, width, text"):
        open_data(tmp_path, caption_column="txt")
    metadata(tmp_path, {"file_name": "1.png", "url": "http://x"})
    with pytest.raises(UserError, match="has the columns url; none is called like a caption"):
        open_data(tmp_path)
    metadata(tmp_path, {"file": "1.png", "text": "one"})
    with pytest.raises(UserError, match="no column 'file_name'; it has file, text"):
        open_data(tmp_path)
    assert seen(open_data(tmp_path, image_column="file")) == [("1.png", ("one",), 1)]


def test_folders_that_cannot_be_used_say_what_they_are(tmp_path):
    with pytest.raises(UserError, match="holds no training images; it holds nothing"):
        open_data(tmp_path)
    write(tmp_path / "1.png", encoded(1))
    with pytest.raises(UserError, match="has 1 images and no captions: .* no 1.txt beside 1.png"):
        open_data(tmp_path)
    write(tmp_path / "metadata.jsonl", "\n\r\n")
    with pytest.raises(UserError, match="has no row that can be read") as caught:
        open_data(tmp_path)
    assert '"file_name"' in caught.value.fix
    write(tmp_path / "metadata.csv", "file_name,text\n")
    with pytest.raises(UserError, match="has metadata.jsonl and metadata.csv"):
        open_data(tmp_path)
    with pytest.raises(UserError, match="metadata.csv is a file") as caught:
        open_data(tmp_path / "metadata.csv")
    assert str(tmp_path) in caught.value.fix
    write(tmp_path / "other/model.bin", b"x")
    with pytest.raises(UserError, match="holds no training images; it holds .bin"):
        open_data(tmp_path / "other")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no-such-folder", "no training images at no-such-folder"),
        ("https://x.org/a.tar", "is not on this machine"),
        ("no-such-{00..03}.tar", "4 of 4 shards .* are missing, the first one is no-such-00.tar"),
        ("no-such-*.tar", "no file matches no-such-"),
        ("nobody/nothing-at-all", "is neither here nor to be had from the hub"),
    ],
)
def test_what_is_not_there(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        open_data(spec)
    assert caught.value.fix


# ---------------------------------------------------------------------------------------------------------- images


def only(tmp_path, name: str, save) -> Image.Image:
    save(tmp_path / name)
    metadata(tmp_path, {"file_name": name, "text": "x"})
    return open_data(tmp_path)[0].image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = only(tmp_path, "a.png", lambda path: an_image(1).save(path, exif=exif))
    with Image.open(tmp_path / "a.png") as stored:
        expected = ImageOps.exif_transpose(stored)
    assert image.size == ((16, 12) if orientation < 5 else (12, 16))
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image(tmp_path):
    image = only(tmp_path, "a.png", lambda path: an_image(1).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert np.array_equal(np.asarray(image), np.asarray(an_image(1)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes_become_rgb(tmp_path, mode):
    image = only(tmp_path, "a.tif", lambda path: an_image(1, mode).save(path))
    assert np.array_equal(np.asarray(image), np.asarray(an_image(1, mode).convert("RGB")))


def test_what_is_transparent_becomes_white(tmp_path):
    red = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))
    red.putpixel((1, 0), (255, 0, 0, 51))
    expected = [[255, 255, 255], [255, 204, 204], [255, 0, 0]]
    assert np.asarray(only(tmp_path, "a.png", red.save))[0].tolist() == expected
    grey = Image.new("LA", (2, 1), (0, 255))
    grey.putpixel((0, 0), (0, 0))
    assert np.asarray(only(tmp_path, "b.png", grey.save))[0].tolist() == [[255] * 3, [0] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    image = only(tmp_path, "c.png", lambda path: palette.save(path, transparency=0))
    assert np.asarray(image)[0].tolist() == [[255] * 3, [40, 50, 60]]


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = only(tmp_path, "a.png", Image.fromarray(values).save)
    assert np.asarray(image)[0].tolist() == [[v] * 3 for v in (0, 1, 128, 255)]


def test_floating_point_images_have_no_known_range(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    metadata(tmp_path, {"file_name": "a.tif", "text": "x"})
    assert "the range of its values (Pillow mode F) is not known" in reason(open_data(tmp_path), 0)


def test_a_decompression_bomb_is_a_broken_image(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    write(tmp_path / "a.png", encoded(1))
    metadata(tmp_path, {"file_name": "a.png", "text": "x"})
    assert "decompression bomb" in reason(open_data(tmp_path), 0)


# ------------------------------------------------------------------------------------------------------------ shards


def shard(path, files: dict[str, bytes | str], **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int) -> dict[str, bytes | str]:
    return {f"s/{number:03}.png": encoded(number), f"s/{number:03}.txt": f"number {number}"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_are_read_in_any_order(tmp_path, form):
    shard(tmp_path / "a-00.tar", sample(3) | sample(1), format=form)
    long = "d/" * 60 + "x" * 40  # a name that needs an extra header
    shard(tmp_path / "a-01.tar", {f"{long}.txt": "two", f"{long}.PNG": encoded(2)}, format=form)
    source = open_data(tmp_path)
    expected = [
        ("a-00.tar/s/003", ("number 3",), 3),
        ("a-00.tar/s/001", ("number 1",), 1),
        (f"a-01.tar/{long}", ("two",), 2),
    ]
    assert seen(source) == expected
    assert [source[row].name for row in (2, 0, 1)] == [expected[row][0] for row in (2, 0, 1)]
    assert seen(pickle.loads(pickle.dumps(source))) == expected


def test_shards_by_pattern(tmp_path):
    for number in (8, 9, 10):
        shard(tmp_path / f"p-{number:03}.tar", sample(number % 10))
    shard(tmp_path / "q-b.tar", sample(4))

    def names(pattern):
        source = open_data(f"{tmp_path}/{pattern}")
        return [source[row].name.partition("/")[0] for row in range(len(source))]

    three = ["p-008.tar", "p-009.tar", "p-010.tar"]
    assert names("p-{008..010}.tar") == names("p-*.tar") == names("p-0[01]?.tar") == three
    assert names("{p-009,q-b}.tar") == ["p-009.tar", "q-b.tar"]
    assert names("p-008.tar") == ["p-008.tar"]
    with pytest.raises(UserError, match="1 of 4 shards .* first one is .*p-011.tar"):
        names("p-{008..011}.tar")


def test_captions_in_json(tmp_path):
    first = {"001.png": encoded(1), "001.json": json.dumps({"caption": ["one", "uno"], "url": "x", "width": 3})}
    path = shard(tmp_path / "a.tar", first | {"002.png": encoded(2), "002.json": "{"})
    source = open_data(path)
    assert source[0].captions == ("one", "uno")
    assert "a.tar/002: its .json is not JSON" in reason(source, 1)
    assert open_data(path, caption_column="url")[0].captions == ("x",)
    with pytest.raises(UserError, match="the .json of .*a.tar has no column 'text'; it has caption, url, width"):
        open_data(path, caption_column="text")
    # img2dataset writes both; the text file is the caption.
    both = shard(tmp_path / "b.tar", first | {"001.txt": "plain"})
    assert open_data(both)[0].captions == ("plain",)
    assert open_data(both, caption_column="caption")[0].captions == ("one", "uno")


def test_samples_that_cannot_be_used(tmp_path):
    path = shard(
        tmp_path / "a.tar",
        sample(1)
        | {"no-text.png": encoded(1), "no-picture.txt": "x"}
        | {"two.png": encoded(1), "two.jpg": encoded(2), "two.txt": "x"}
        | {"latin.png": encoded(1), "latin.txt": b"caf\xe9", "bad.png": b"x", "bad.txt": "x", ".hidden": "x"},
    )
    source = open_data(path)
    whys = [reason(source, row) for row in range(1, len(source))]
    assert whys == [
        "a.tar/no-text: it has no .txt; it has png",
        "a.tar/no-picture: it has no image; it has txt",
        "a.tar/two: it has several images (png, jpg); name one: --image-column",
        "a.tar/latin: its caption is not UTF-8",
        "a.tar/bad: not an image, or a format that Pillow cannot read",
    ]
    named = open_data(path, image_column=".JPG")
    assert np.array_equal(np.asarray(named[3].image), np.asarray(an_image(2)))
    with pytest.raises(UserError, match="no sample has a .gif; there are .png, .txt, .jpg"):
        open_data(path, image_column="gif")


def test_a_name_that_a_shard_has_twice_is_not_guessed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for text in ("one", "two"):
            for name, content in (("001.png", encoded(1)), ("001.txt", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert "a.tar/001: its shard has several .txt of that name" in reason(open_data(path), 0)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_shard_that_is_cut_short_gives_what_it_has_and_says_so(tmp_path, cut):
    whole = shard(tmp_path / "whole.tar", {k: v for number in range(6) for k, v in sample(number).items()})
    content = whole.read_bytes()
    end = 512 * 3 * 6 + sum(-(-len(v) // 512) * 512 for n in range(6) for v in [encoded(n)])
    path = write(tmp_path / "cut" / "a.tar", content[: int(end * cut)])
    with pytest.warns(Notice, match="a.tar (is damaged|ends without)"):
        source = open_data(path)
    good = 0
    for row in range(len(source)):
        try:
            assert source[row].captions == (f"number {row}",)
            good += 1
        except BrokenItem as broken:
            assert row == len(source) - 1
            assert "ends before it does" in broken.reason or "it has no" in broken.reason
    assert int(cut * 6) - 1 <= good <= int(cut * 6) + 1


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = shard(tmp_path / "a.tar", {k: v for number in range(4) for k, v in sample(number).items()})
    with tarfile.open(path) as tar:
        offset = tar.getmember("s/002.png").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.warns(Notice, match="may be damaged or cut short; 2 samples were found in it"):
        assert len(open_data(path)) == 2


def test_one_shard_that_is_none_does_not_stop_the_others(tmp_path):
    shard(tmp_path / "a.tar", sample(1))
    write(tmp_path / "b.tar", b"<html>404</html>" * 100)
    with pytest.warns(Notice, match="b.tar is not a tar file"):
        source = open_data(tmp_path)
    assert seen(source) == [("a.tar/s/001", ("number 1",), 1)]
    with pytest.warns(Notice), pytest.raises(UserError, match="b.tar: no samples"):
        open_data(tmp_path / "b.tar")


def test_compressed_shards_and_shards_without_images_or_captions(tmp_path):
    write(tmp_path / "a.tar.gz", b"x")
    with pytest.raises(UserError, match="is compressed"):
        open_data(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match="no sample has an image; there are .txt"):
        open_data(shard(tmp_path / "b.tar", {"1.txt": "x"}))
    with pytest.raises(UserError, match="no sample has captions: no .txt, no .json; there are .png, .cls"):
        open_data(shard(tmp_path / "c.tar", {"1.png": encoded(1), "1.cls": "4"}))


def test_a_shard_is_indexed_once_and_again_when_it_changes(tmp_path, monkeypatch):
    from accel.distill.sources import webdataset

    path = shard(tmp_path / "a.tar", sample(1) | sample(2))
    reads = []
    read = webdataset._read_index
    monkeypatch.setattr(webdataset, "_read_index", lambda path: reads.append(path) or read(path))
    first = open_data(path)
    second = open_data(path)
    assert len(reads) == 1 and first.identity == second.identity and seen(first) == seen(second)
    shard(path, sample(5) | sample(2))
    os.utime(path, ns=(1, 1))
    third = open_data(path)
    assert len(reads) == 2 and third[0].captions == ("number 5",) and third.identity != first.identity


def test_a_damaged_index_is_made_again_and_one_that_cannot_be_kept_does_no_harm(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", sample(1))
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    expected = seen(open_data(path))
    (kept,) = (tmp_path / "cache/webdataset").iterdir()
    for damage in ("", "[]", "{}", kept.read_text()[:50], "null"):
        kept.write_text(damage)
        assert seen(open_data(path)) == expected
    monkeypatch.setenv("ACCEL_CACHE", str(write(tmp_path / "file", "a file where the cache should be")))
    assert seen(open_data(path)) == expected


# ---------------------------------------------------------------------------------------------------------- datasets


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def table(**more) -> datasets.Dataset:
    images = [{"bytes": encoded(number), "path": f"{number}.png"} for number in (2, 0, 1)]
    made = datasets.Dataset.from_dict({"image": images, "text": ["two", "nought", "one"]} | more)
    return made.cast_column("image", datasets.Image())


EXPECTED = [("row 0 (2.png)", ("two",), 2), ("row 1 (0.png)", ("nought",), 0), ("row 2 (1.png)", ("one",), 1)]


def strip(found):
    """Without names, which depend on what the format keeps of them."""
    return [entry[1:] for entry in found]


def test_a_saved_dataset(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved")
    assert strip(seen(source)) == strip(EXPECTED)
    assert strip(seen(pickle.loads(pickle.dumps(source)))) == strip(EXPECTED)
    assert source.captions(1) == ("nought",)


def test_a_saved_dataset_with_splits(tmp_path):
    datasets.DatasetDict({"train": table(), "val": table().select([2])}).save_to_disk(tmp_path / "saved")
    assert len(open_data(tmp_path / "saved")) == 3
    assert strip(seen(open_data(tmp_path / "saved", split="val"))) == [(("one",), 1)]
    with pytest.raises(UserError, match="no split 'test'; it has train, val") as caught:
        open_data(tmp_path / "saved", split="test")
    assert caught.value.fix == f"give one: {tmp_path / 'saved/train'}"
    assert len(open_data(tmp_path / "saved/val")) == 1


def test_parquet_file_and_folder(tmp_path):
    (tmp_path / "data").mkdir()
    table().to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    assert strip(seen(open_data(tmp_path / "data/train-00000-of-00001.parquet"))) == strip(EXPECTED)
    assert strip(seen(open_data(tmp_path))) == strip(EXPECTED)


def test_a_parquet_file_of_plain_bytes(tmp_path):
    made = datasets.Dataset.from_dict({"jpg": [encoded(1), b"x"], "caption": [["one", "uno"], ["two"]]})
    made.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has the columns jpg, caption; none is of the type Image"):
        open_data(tmp_path / "a.parquet")
    source = open_data(tmp_path / "a.parquet", image_column="jpg")
    assert source[0].captions == ("one", "uno")
    assert reason(source, 1) == "row 1: not an image, or a format that Pillow cannot read"
    assert len(source.identity) == 64


def test_columns_of_a_dataset_are_named_and_not_numbered(tmp_path):
    table(prompt=["a", "b", "c"], score=[1, 2, 3]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="columns text, prompt, score; several may hold the captions: text, prompt"):
        open_data(tmp_path / "saved")
    assert open_data(tmp_path / "saved", caption_column="prompt")[1].captions == ("b",)
    with pytest.raises(UserError, match="has no column 'picture'"):
        open_data(tmp_path / "saved", image_column="picture")
    with pytest.raises(UserError, match="the column score holds .*, not images"):
        open_data(tmp_path / "saved", image_column="score", caption_column="text")
    two = table().add_column("mask", [{"bytes": encoded(9), "path": None}] * 3).cast_column("mask", datasets.Image())
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several hold images: image, mask"):
        open_data(tmp_path / "two")
    assert strip(seen(open_data(tmp_path / "two", image_column="image"))) == strip(EXPECTED)


def test_rows_of_a_dataset_that_cannot_be_used(tmp_path):
    whole = encoded(1)
    made = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": whole[:99], "path": "a.png"}, None, *[{"bytes": whole, "path": None}] * 2],
            "text": ["x", "x", None, " "],
        }
    ).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved")
    assert reason(source, 0).startswith("row 0 (a.png): cannot be decoded")
    assert [reason(source, row) for row in (1, 2, 3)] == [
        "row 1: it has no image in image",
        "row 2: it has no caption",
        "row 3: its caption is empty",
    ]
    assert len(source.identity) == 64


def test_a_dataset_of_paths_reads_the_files(tmp_path):
    # save_to_disk would take the files in, so the dataset is used as it lies in memory.
    paths = [str(write(tmp_path / f"{number}.png", encoded(number))) for number in range(2)]
    made = datasets.Dataset.from_dict({"image": paths, "text": ["nought", "one"]})
    made = made.cast_column("image", datasets.Image())
    source = _source(made, None, None, "here")
    assert seen(source) == [("row 0 (0.png)", ("nought",), 0), ("row 1 (1.png)", ("one",), 1)]
    whole = source.identity
    (tmp_path / "1.png").unlink()
    assert reason(source, 1) == "row 1 (1.png): No such file or directory"
    assert _source(made, None, None, "here").identity != whole


def test_a_damaged_dataset(tmp_path):
    table().save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.arrow"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="saved cannot be read as a dataset"):
        open_data(tmp_path / "saved")


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits():
    source = open_data("digits")
    images, labels = digits.dataset("train")
    assert len(source) == 1297
    for row in (0, 500, 1296):
        item = source[row]
        assert item.captions == digits.prompts(int(labels[row])) and len(item.captions) == 12
        pixels = np.asarray(item.image, np.float32) / 127.5 - 1
        assert np.abs(pixels.transpose(2, 0, 1) - images[row].numpy()).max() <= 1 / 255 + 1e-6
    assert source.identity == open_data("digits").identity != open_data("digits", split="held-out").identity
    with pytest.raises(UserError, match="no split 'test'"):
        open_data("digits", split="test")


# ---------------------------------------------------------------------------------------------------------- identity


def folder_of_three(folder):
    for number in range(3):
        write(folder / f"{number}.png", encoded(number))
    metadata(folder, *({"file_name": f"{n}.png", "text": f"number {n}", "alt_text_id": n} for n in range(3)))
    return folder


def beside_of_three(folder):
    for number in range(3):
        write(folder / f"{number}.png", encoded(number))
        write(folder / f"{number}.txt", f"number {number}")
    return folder


def shard_of_three(folder):
    shard(folder / "a.tar", {k: v for number in range(3) for k, v in sample(number).items()})
    return folder


def dataset_of_three(folder):
    table().save_to_disk(folder)
    return folder


@pytest.mark.parametrize("make", [folder_of_three, beside_of_three, shard_of_three, dataset_of_three])
def test_the_identity_is_the_contents_and_not_the_places(tmp_path, make):
    one, two = open_data(make(tmp_path / "one")).identity, open_data(make(tmp_path / "elsewhere")).identity
    assert one == two and len(one) == 64


def test_the_identity_changes_with_names_sizes_and_captions(tmp_path):
    def folder(name, change):
        change(folder_of_three(tmp_path / name))
        return open_data(tmp_path / name).identity

    def beside(name, change):
        change(beside_of_three(tmp_path / name))
        return open_data(tmp_path / name).identity

    def edit(path):
        path.write_text(path.read_text().replace("number 1", "Number 1"))

    found = [
        folder("f0", lambda path: None),
        folder("f1", lambda path: edit(path / "metadata.jsonl")),
        folder("f2", lambda path: (path / "1.png").write_bytes(b"x")),
        folder("f3", lambda path: (path / "1.png").unlink()),
        beside("b0", lambda path: None),
        beside("b1", lambda path: edit(path / "1.txt")),
        beside("b2", lambda path: (path / "1.txt").unlink()),
        beside("b3", lambda path: (path / "1.png").rename(path / "9.png")),
        open_data(shard(tmp_path / "s0.tar", sample(1))).identity,
        open_data(shard(tmp_path / "s1.tar", sample(1) | {"s/001.txt": "number !"})).identity,
        open_data(shard(tmp_path / "s2.tar", {"t/001.png": encoded(1), "t/001.txt": "number 1"})).identity,
    ]
    for name, made in (
        ("d0", table()),
        ("d1", table().select([0, 2, 1])),
        ("d2", table().map(lambda row: {"text": row["text"] + "!"})),
    ):
        made.save_to_disk(tmp_path / name)
        found.append(open_data(tmp_path / name).identity)
    assert len(set(found)) == len(found)
