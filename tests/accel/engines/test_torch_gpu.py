"""eager, compile, ONNX Runtime, our kernels, the bench and training on a GPU; where it can be, on a CPU too."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch

import accel
from accel import kernels
from accel.parity import relative_l2
from accel.providers import gpu

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def feeds(engine, batch=2):
    torch.manual_seed(0)
    made = {}
    for spec in engine.component.inputs:
        shape = [{"batch": batch}.get(d, engine.component.dims[d].min) if isinstance(d, str) else d for d in spec.shape]
        made[spec.name] = torch.full(shape, 500.0) if spec.name == "timestep" else torch.randn(shape)
        made[spec.name] = made[spec.name].to(getattr(torch, spec.dtype))
    return made


@pytest.fixture(scope="module")
def expected(smallest_bundle):
    unet = accel.load_engine(smallest_bundle, "unet", "eager", device="cpu")
    return unet(**feeds(unet))["out_sample"].numpy()


def out(bundle, engine, **options):
    unet = accel.load_engine(bundle, "unet", engine, **options)
    made = unet(**feeds(unet))["out_sample"]
    return made.float().cpu().numpy() if torch.is_tensor(made) else made


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_eager_in_float32_is_exact_there(device, smallest_bundle, expected):
    """TF32 would be 1e-3 away."""
    assert relative_l2(out(smallest_bundle, "eager", device=device), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"dtype": "fp16"}, {"dtype": "bf16"}, {"tf32": True}, {"attention": "math"}, {"layout": "nhwc"}]
)
def test_eager_in_other_precisions(options, smallest_bundle, expected):
    assert relative_l2(out(smallest_bundle, "eager", device="cuda", **options), expected) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"mode": "reduce-overhead"}, {"regional": True}, {"cuda_graph": "step"}, {"layout": "nhwc"}]
)
def test_compile(options, smallest_bundle, expected):
    assert relative_l2(out(smallest_bundle, "compile", device="cuda", **options), expected) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["step", "loop"])
def test_cuda_graphs_of_eager_make_the_same_image(graph, smallest_bundle):
    plain, captured = (accel.load(smallest_bundle, "eager", device="cuda", cuda_graph=g) for g in ("off", graph))
    for seed in (0, 1, 0):
        a, b = (p("the cat", seed=seed, steps=3, output_type="np").images for p in (plain, captured))
        assert abs(a - b).max() < 1 / 255


@pytest.mark.gpu
def test_onnx_runtime_on_cuda(smallest_bundle, expected):
    if not gpu.listed("cuda"):
        pytest.skip("this onnxruntime has no CUDA provider")
    assert gpu.trouble("cuda") is None
    assert relative_l2(out(smallest_bundle, "onnxruntime", provider="cuda"), expected) < 1e-3


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_kernels_there_equal_their_references(device):
    torch.manual_seed(0)
    x = torch.randn(2, 320, 16, 24, device=device).contiguous(memory_format=torch.channels_last)
    weight, bias, shift = (torch.randn(shape, device=device) for shape in ((320,), (320,), (2, 320)))
    ours = kernels.group_norm_silu(x, weight, bias, 32, shift=shift).cpu()
    given = [value.cpu() for value in (x, weight, bias)]
    assert torch.allclose(ours, kernels.group_norm_silu(*given, 32, shift=shift.cpu()), atol=1e-4)
    gate = torch.randn(3, 100, 640, device=device)
    assert torch.allclose(kernels.geglu(gate).cpu(), kernels.geglu(gate.cpu()), atol=1e-5)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        q, scale = kernels.quant_rowwise(gate, dtype)
        theirs, their_scale = kernels.quant_rowwise(gate.cpu(), dtype)
        assert torch.allclose(scale.cpu(), their_scale) and (q.cpu().float() != theirs.float()).float().mean() < 1e-4
    q, scale = kernels.quant_rowwise(torch.randn(64, 640, device=device), torch.int8)
    made = kernels.w8a8_linear(gate, q, scale).cpu()
    assert torch.allclose(made, kernels.w8a8_linear(gate.cpu(), q.cpu(), scale.cpu()), atol=1e-2)


@pytest.mark.gpu
def test_a_patched_model_there(sd15):
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd15 / "unet").to("cuda", memory_format=torch.channels_last)
    given = torch.randn(2, 4, 16, 16, device="cuda"), torch.tensor(7), torch.randn(2, 5, 32, device="cuda")
    with torch.no_grad():
        before = unet(*given)[0]
        for linear, most in ((None, 1e-3), ("int8", 0.1)):
            with accel.patch(unet, linear=linear):
                assert (unet(*given)[0] - before).norm() < most * before.norm()
        assert torch.equal(unet(*given)[0], before)


@pytest.mark.gpu
def test_the_bench_there(smallest_bundle, tmp_path, capsys):
    from accel.cli import main

    names = "eager,eager:fp16,eager:fp16:loop"
    assert main(["bench", str(smallest_bundle), "--engine", names, "--rounds", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["environment"]["device"] == "cuda"
    for row in document["rows"]:
        assert row["status"] == "measured" and 0 < row["scopes"]["unet"]["peak_fraction"] < 1


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_step_of_training_with_the_kernels_there(device, sd15):
    unet = diffusers.UNet2DConditionModel.from_pretrained(sd15 / "unet").to(device).train()
    accel.patch(unet)
    optimizer, losses = torch.optim.AdamW(unet.parameters(), 1e-3), []
    torch.manual_seed(0)
    given = [value.to(device) for value in (torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 32))]
    target = torch.randn(2, 4, 16, 16, device=device)
    for _ in range(4):
        with torch.autocast(device, torch.bfloat16):
            loss = (unet(*given)[0].float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
