"""Number formats as data: what a manifest says of a layer, and which layers take which."""

import pytest

from accel.int8.formats import BLOCKS, FORMATS, FP8, INT4_WEIGHTS, INT8, INT8_WEIGHTS, as_traits, for_layer, of_layer


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_a_layers_traits_tell_its_format_and_block(form):
    block = 64 if form.blocked else 0
    assert of_layer([*as_traits(form, block), "smooth", "output"]) == (form, block)
    assert of_layer(["bos"]) == (INT8, 0), "int8 is what manifests had before there were other formats"


def test_int4_is_for_linear_layers_that_whole_blocks_fit_into():
    assert for_layer(INT4_WEIGHTS, 64, (320, 640)) == (INT4_WEIGHTS, 64)
    assert for_layer(INT4_WEIGHTS, 128, (320, 320)) == (INT8_WEIGHTS, 0), "320 inputs are no whole blocks of 128"
    assert for_layer(INT4_WEIGHTS, 64, (321, 640)) == (INT8_WEIGHTS, 0), "two outputs share a byte"
    assert for_layer(INT4_WEIGHTS, 64, (320, 640, 3, 3)) == (INT8_WEIGHTS, 0)
    assert for_layer(FP8, 64, (320, 640, 3, 3)) == (FP8, 0)
    assert all(block & (block - 1) == 0 and block >= 16 for block in BLOCKS), "what ONNX Runtime's MatMulNBits takes"
