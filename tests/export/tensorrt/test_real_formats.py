"""fp8 and weight-only graphs, built by NVIDIA's real library and audited by its own list of layers."""

import warnings

import pytest

from accel.assets import resolve
from accel.bundle import Bundle
from accel.errors import Notice, UserError
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.export.tensorrt.build import build
from accel.trt import library

RTX = "tensorrt-rtx"
pytestmark = pytest.mark.skipif(
    library.installed(RTX) is None, reason='TensorRT-RTX is not installed: pip install "accel-diffusion[tensorrt-rtx]"'
)
QUICK = dict(images=2, evaluation_images=1)


def lowered(bundle, out, precision: str, *components: str) -> Bundle:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        settings = Int8Settings(components=components, **QUICK)
        return export_pipeline(bundle, out, precision=precision, int8=settings)


@pytest.fixture(scope="module")
def fp8(smallest_bundle, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("fp8") / "bundle"
    return lowered(smallest_bundle, folder, "fp8", "text_encoder", "vae_decoder")


def test_every_quantized_layer_runs_in_fp8_on_the_cards_that_have_it(fp8):
    said: list[str] = []
    files = build(fp8, ["text_encoder", "vae_decoder"], engine=RTX, announce=said.append)
    assert "for sm89, sm120: the others have no fp8" in said
    for file in files:
        counts, layers = file.record["audit"], fp8.component(file.component).int8["layers"]
        done, of = counts["int8_share"]
        assert done == of == len(layers) and counts["heavy"]["fp8"] >= len(layers) / 2 and counts["wider"] == []
        assert counts["wanted"] == "fp8" and list(file.record["identity"]["targets"]) == ["sm89", "sm120"]
    assert any(f"{len(layers)} of {len(layers)} fp8 nodes" in line for line in said)


def test_a_card_without_fp8_is_refused_before_the_build(fp8):
    with pytest.raises(UserError, match=r"is fp8, which sm80, sm86 cannot compute: it takes compute capability 8\.9"):
        build(fp8, ["text_encoder"], engine=RTX, targets=["sm80", "sm86", "sm89"])


@pytest.mark.parametrize("precision", ["int8-weight-only-fp16", "int4-weight-only-fp16"])
def test_weights_alone_are_built_for_every_card(smallest_bundle, tmp_path, precision):
    bundle = lowered(smallest_bundle, tmp_path / "bundle", precision, "text_encoder")
    (file,) = build(bundle, ["text_encoder"], engine=RTX)
    assert set(file.record["audit"]["heavy"]) == {"fp16"} and file.record["audit"]["wanted"] == "fp16"


@pytest.mark.slow
def test_the_digits_unet_runs_every_quantized_layer_in_fp8(tmp_path):
    bundle = export_pipeline(resolve("digits/4step"), tmp_path / "fp32", profile="batch=1-2,size=64")
    bundle = lowered(bundle.path, tmp_path / "fp8", "fp8", "unet")
    (file,) = build(bundle, ["unet"], engine=RTX, targets=["sm89", "sm120"])
    counts = file.record["audit"]
    assert counts["int8_share"] == [242, 242] and counts["wider"] == [] and counts["fused_attentions"] == 12
