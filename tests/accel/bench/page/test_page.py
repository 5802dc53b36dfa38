"""The page of a result: every figure is the document's, nothing of a file becomes markup, nothing asks a network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from accel.bench.page import page
from accel.bench.page.difference import FACTORS, SCALE, coloured, difference, in_words
from accel.bench.page.markup import Html, join, tag
from accel.bench.results import saved
from accel.bench.results.bounds import bounds
from accel.bench.results.verdict import clock
from accel.errors import UserError


class Reader(HTMLParser):
    """Elements by name with their attributes, and whether all that opens also closes."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.found = [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.found.append((name, dict(attributes)))
        if name not in ("img", "input", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name


def test_text_is_escaped_and_markup_is_not():
    assert tag("p", "<b>", Html("<i></i>"), class_='a"b', data_x=1, hidden=True, no=None) == (
        '<p class="a&quot;b" data-x="1" hidden>&lt;b&gt;<i></i></p>'
    )
    assert join("a", [None, ["<"]]) == "a&lt;"


def test_the_page_is_well_formed_self_contained_and_labelled(document, images):
    text = page(document, images)
    read = Reader(text)
    assert read.open == []
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http" not in text and "url(" not in text
    assert all(attributes.get("alt") for name, attributes in read.found if name == "img")
    sliders = [attributes for name, attributes in read.found if name == "input" and attributes["type"] == "range"]
    assert len(sliders) == 2 and all(slider["aria-label"] for slider in sliders)
    labels = {attributes.get("aria-labelledby") for name, attributes in read.found if name == "section"}
    assert labels <= {attributes.get("id") for name, attributes in read.found if name == "h2"}
    assert {"header", "main", "footer"} <= {name for name, _ in read.found}


def test_what_bounds_each_network_is_named_where_the_memorys_rate_is_known(document):
    assert "What bounds it" not in page(document)
    document["environment"]["bandwidth_bytes_per_s"] = 1e9
    for scope in document["work"]["scopes"].values():
        scope["io_bytes"] = 1000
    text = page(document)
    fastest = min((row for row in document["rows"] if clock(row)), key=clock)
    shown = {attributes["value"] for name, attributes in Reader(text).found if name == "data"}
    parts = bounds(document, fastest)
    assert [part.name for part in parts] == list(document["bundle"]["components"])
    assert {str(part.share) for part in parts} | {str(part.intensity) for part in parts} <= shown
    assert "What bounds it" in text and text.count("-bound</td>") == len(parts) and "More than 100 %" not in text


def test_the_figures_are_the_documents(document):
    shown = {attributes["value"] for name, attributes in Reader(page(document)).found if name == "data"}
    for row in document["rows"]:
        if timing := row["scopes"]["image"]["timing"]:
            assert str(timing["p50_s"]) in shown
            assert str(row["process"]["peak_rss_bytes"]) in shown
            assert str(row["parity"]["image"]["psnr"]) in shown or row["variant"] == "eager"


def test_the_page_carries_the_document_and_is_read_again(document, images, tmp_path):
    (tmp_path / "x.html").write_text(page(document, images))
    assert saved.read(str(tmp_path / "x.html")) == document
    (tmp_path / "y.html").write_text("<p>nothing</p>")
    with pytest.raises(UserError, match="carries no benchmark result"):
        saved.read(str(tmp_path / "y.html"))


def test_a_hostile_document_adds_no_element(document):
    plain = [name for name, _ in Reader(page(document)).found]
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    hostile = json.loads(json.dumps(document))
    hostile["command"] = hostile["bundle"]["name"] = hostile["rows"][0]["description"] = evil
    hostile["notes"] = [evil for _ in hostile["notes"]]
    assert [name for name, _ in Reader(page(hostile)).found] == plain


def test_what_was_not_measured_says_why(document):
    assert "openvino:bf16</strong> was not measured: the picture is NaN or infinite" in page(document)


def test_a_difference_is_scaled_by_a_stated_factor_and_said_in_words():
    eager = np.full((4, 4, 3), 100, np.uint8)
    other = eager.copy()
    other[0, 0] = (100, 93, 102)
    found = difference(other, eager)
    assert (found.most, found.factor, found.share) == (7, 20, 1 / 16)
    assert found.most * found.factor <= 255 < found.most * FACTORS[FACTORS.index(found.factor) - 1]
    assert in_words(found) == "6.25 % of the pixels differ, by at most 7 of 255"
    pixels = coloured(found)
    assert tuple(pixels[1, 1]) == SCALE[0] and pixels[0, 0].sum() < pixels[1, 1].sum()
    same = difference(eager, eager)
    assert same.most == 0 and in_words(same) == "identical: every pixel has the same value"
    most = difference(np.zeros_like(eager), np.full_like(eager, 255))
    assert most.factor == 1 and tuple(coloured(most)[0, 0]) == SCALE[-1]


def test_images_without_a_reference_are_shown_alone(document, images):
    text = page(document, {"onnxruntime": images["onnxruntime"]})
    assert text.count('class="alone"') == 2 and 'type="range"' not in text
