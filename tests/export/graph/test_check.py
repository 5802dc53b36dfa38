import numpy as np
import pytest

from accel.errors import UserError
from accel.export.graph.check import FP16_FACTOR, FP32_GATE, gate, worst

TRUTH = [[np.ones(4, np.float32), np.arange(1, 5, dtype=np.float32)]]


def test_the_worst_output_of_the_worst_batch_counts():
    close = [TRUTH[0][0], TRUTH[0][1] * np.float32(1.01)]
    far = [TRUTH[0][0] * np.float32(1.5), TRUTH[0][1]]
    assert worst([close], TRUTH) == pytest.approx(0.01, rel=1e-3)
    assert worst([close, far], TRUTH * 2) == pytest.approx(0.5)
    assert worst(TRUTH, TRUTH) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad):
    broken = [TRUTH[0][0], TRUTH[0][1].copy()]
    broken[1][2] = bad
    assert worst([broken], TRUTH) == float("inf")


def test_a_missing_output_is_an_error():
    with pytest.raises(ValueError):
        worst([TRUTH[0][:1]], TRUTH)


def test_float32_has_a_fixed_gate():
    assert gate("unet", "float32", FP32_GATE, 0.0)["limit"] == FP32_GATE
    with pytest.raises(UserError, match="unet: the exported graph differs"):
        gate("unet", "float32", FP32_GATE * 1.01, 0.0)


def test_float16_is_measured_against_the_rounding_of_torch_itself():
    figures = gate("unet", "float16", 1e-3, 1e-3)
    assert figures == {"relative_l2": 1e-3, "limit": FP16_FACTOR * 1e-3, "torch_relative_l2": 1e-3}
    with pytest.raises(UserError):
        gate("unet", "float16", FP16_FACTOR * 1e-3 * 1.01, 1e-3)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(precision, error):
    with pytest.raises(UserError):
        gate("unet", precision, error, 1e-3)


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("floor", [float("inf"), float("nan")])
@pytest.mark.parametrize("error", [float("inf"), float("nan"), 0.0])
def test_a_graph_is_not_right_because_torch_is_as_wrong(precision, floor, error):
    with pytest.raises(UserError, match=f"{precision} alone changes the output by .*, in torch too"):
        gate("unet", precision, error, floor)


@pytest.mark.parametrize("floor", [float("inf"), float("nan"), 0.5])
def test_a_precision_that_breaks_torch_itself_is_no_excuse(floor):
    with pytest.raises(UserError, match="float16") as caught:
        gate("unet", "float16", min(floor, 0.4), floor)
    assert "fp32" in caught.value.fix
