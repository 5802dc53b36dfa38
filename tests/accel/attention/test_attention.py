"""The table of attention kernels: what cannot run here is refused, and what can computes what diffusers does."""

from __future__ import annotations

import sys
from types import ModuleType

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

import accel
from accel.attention import KERNELS, NAMES, check, kernels
from accel.attention.processor import AttentionOn, set_attention
from accel.distill.settings import ATTENTIONS
from accel.errors import UserError


def test_engines_and_training_have_one_table():
    assert ATTENTIONS == NAMES == ("auto", *KERNELS)


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of a compute capability, as far as the table asks."""

    def of(major, minor=0):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))

    return of


def package(monkeypatch, name, **functions):
    """Put a package with these functions where imports find it, and its parents."""
    parts = name.split(".")
    for i in range(len(parts)):
        module = ModuleType(".".join(parts[: i + 1]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(functions)


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch, gpu):
    """They share a package: `find_spec("flash_attn")` says nothing of `flash_attn_func`."""
    gpu(9)
    package(monkeypatch, "flash_attn.cute", flash_attn_func=lambda q, k, v: (q, None))
    assert check("flash-attn-4", device="cuda", half=True) == "flash-attn-4"
    with pytest.raises(UserError, match="needs flash_attn.flash_attn_interface.flash_attn_func: ") as refused:
        check("flash-attn", device="cuda", half=True)
    assert refused.value.fix == 'pip install "accel-diffusion[flash-attn]"'


@pytest.mark.parametrize(
    ("name", "device", "half", "why"),
    [
        ("cudnn", "cpu", True, "needs a CUDA device, this run is on cpu"),
        ("cudnn", "cuda", False, "half precision only"),
        ("efficient", "cpu", False, "needs a CUDA device"),
        ("flash-attn-3", "cuda", True, "flash_attn_interface.flash_attn_func: ModuleNotFoundError"),
        ("flash", "cuda", True, "has no code for compute capability 7.5"),
        ("best", "cpu", False, "unknown attention 'best'"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(name, device, half, why, gpu):
    gpu(7, 5)
    with pytest.raises(UserError, match=why) as refused:
        check(name, device=torch.device(device) if name != "best" else device, half=half)
    assert refused.value.fix


def test_a_package_that_breaks_while_it_is_imported_is_refused(monkeypatch, gpu):
    gpu(9)

    def broken(name):
        raise OSError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(kernels, "import_module", broken)
    with pytest.raises(UserError, match="OSError: undefined symbol"):
        check("xformers", device="cuda", half=False)


def test_auto_is_torchs_own_choice():
    assert check("auto", device="cpu", half=False) == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("image", [False, True])
@torch.no_grad()
def test_the_processor_computes_what_diffusers_does(image, masked):
    torch.manual_seed(0)
    more = dict(norm_num_groups=4, residual_connection=True, rescale_output_factor=1.5) if image else {}
    layer = Attention(32, None if image else 24, heads=4, dim_head=8, **more).eval()
    x = torch.randn(2, 32, 3, 5) if image else torch.randn(2, 15, 32)
    context = None if image else torch.randn(2, 7, 24)
    mask = torch.where(torch.rand(2, 1, 15 if image else 7) > 0.3, 0.0, -1e4) if masked else None
    layer.set_processor(AttnProcessor2_0())
    expected = layer(x, context, attention_mask=mask)
    for name in ("math", "sdpa"):
        layer.set_processor(AttentionOn(name))
        assert torch.allclose(layer(x, context, attention_mask=mask), expected, atol=1e-5)


@torch.no_grad()
def test_a_package_is_given_batch_tokens_heads_width_and_no_mask(monkeypatch):
    shapes = []

    def flash_attn_func(q, k, v):
        shapes.append((tuple(q.shape), tuple(k.shape)))
        q, k, v = (value.transpose(1, 2) for value in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), "sums of the softmax"

    package(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    layer = Attention(32, 24, heads=4, dim_head=8).eval()
    x, context = torch.randn(2, 15, 32), torch.randn(2, 7, 24)
    expected = layer(x, context)
    layer.set_processor(AttentionOn("flash-attn-4"))
    assert torch.allclose(layer(x, context), expected, atol=1e-5) and shapes == [((2, 15, 4, 8), (2, 7, 4, 8))]
    with pytest.raises(UserError, match="takes no attention mask"):
        layer(x, context, attention_mask=torch.zeros(2, 1, 7))


def test_processors_of_another_kind_stay(sd15):
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd15 / "unet")
    own = object()
    first = next(layer for layer in unet.modules() if isinstance(layer, Attention))
    first.processor = own
    layers = sum(isinstance(layer, Attention) for layer in unet.modules())
    assert set_attention(unet, "math") == layers - 1 and first.processor is own
    with pytest.raises(UserError, match="no effect on Linear"):
        set_attention(torch.nn.Linear(2, 2), "math")


@pytest.mark.parametrize("engine", ["eager", "compile"])
def test_the_torch_engines_take_it_and_say_so(engine, smallest_bundle):
    unet = accel.load_engine(smallest_bundle, "unet", engine, attention="math")
    assert "attention math" in unet.description
    assert sum(isinstance(getattr(m, "processor", None), AttentionOn) for m in unet.module.modules())
    assert "attention" not in accel.load_engine(smallest_bundle, "vae_decoder", engine, attention="math").description
    with pytest.raises(UserError, match="unknown attention"):
        accel.load_engine(smallest_bundle, "vae_decoder", engine, attention="warp")


def test_other_engines_have_no_such_option(smallest_bundle):
    with pytest.raises(UserError, match="no option 'attention'") as refused:
        accel.load_engine(smallest_bundle, "unet", "onnxruntime", attention="math")
    assert "eager" in refused.value.fix


def test_the_command_line_takes_it(smallest_bundle, tmp_path, capsys):
    from accel.cli import main

    command = ["run", str(smallest_bundle), "--prompt", "the cat", "--engine", "eager", "--json", "--steps", "1"]
    assert main([*command, "--attention", "math", "--out", str(tmp_path / "a.png")]) == 0
    assert "attention math" in capsys.readouterr().out
    assert main([*command, "--attention", "cudnn", "--out", str(tmp_path / "b.png")]) != 0
    assert "needs a CUDA device" in capsys.readouterr().err
