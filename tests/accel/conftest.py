"""The command line, run in this process; IP-Adapters with random weights."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from accel.cli import main


@pytest.fixture
def accel(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*args) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as error:
                code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "bug in accel" not in err, err
        return code, out, err

    shown = warnings.showwarning
    yield call
    warnings.showwarning = shown


@pytest.fixture
def refused(accel):
    """Run the command line, which must fail with one message that has a fix."""

    def call(*args) -> str:
        code, _, err = accel(*args)
        assert code in (1, 2)
        # Before the error: notes, stages of the work, and transformers' bar, which is silenced by an environment
        # variable that it reads when it is first imported.
        others = re.compile(r"note:|engine:|Loading weights| *\d+ %: ")
        lines = [line for line in err.splitlines() if line.strip() and not others.match(line)]
        assert lines[0].startswith("error: ") and lines[-1].startswith("  fix: "), err
        assert err.count("error:") == 1
        return err

    return call


def make_image_encoder(folder: Path, projection: int = 24) -> Path:
    """CLIP's vision tower, narrowed: 28 px, four patches of width 32."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=projection,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def ip_adapter_state(source: Path, kind: str = "plain") -> dict:
    """Random weights of an IP-Adapter for a pipeline's UNet, in the published layout: {"image_proj", "ip_adapter"}."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source / "unet"))
    random = torch.Generator().manual_seed(8)

    def linear(outer: int, inner: int) -> torch.Tensor:
        return torch.randn(outer, inner, generator=random) / inner**0.5

    def norm(name: str, width: int) -> dict:
        return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}

    context, width, hidden = unet.config.cross_attention_dim, 32, 64
    if kind == "plain":
        projection = {"proj.weight": linear(4 * context, 24), "proj.bias": torch.randn(4 * context, generator=random)}
        projection |= norm("norm", context)
    elif kind == "full":
        projection = {"proj.0.weight": linear(width, width), "proj.0.bias": torch.zeros(width)}
        projection |= {"proj.2.weight": linear(context, width), "proj.2.bias": torch.zeros(context)}
        projection |= norm("proj.3", context)
    else:
        projection = {"latents": torch.randn(1, 5, hidden, generator=random)}
        projection |= {"proj_in.weight": linear(hidden, width), "proj_in.bias": torch.zeros(hidden)}
        projection |= {"proj_out.weight": linear(context, hidden), "proj_out.bias": torch.zeros(context)}
        projection |= norm("norm_out", context)
        for i in range(4):
            attention, forward = f"layers.{i}.0", f"layers.{i}.1"
            projection |= norm(f"{attention}.norm1", hidden) | norm(f"{attention}.norm2", hidden)
            projection[f"{attention}.to_q.weight"] = linear(64, hidden)
            projection[f"{attention}.to_kv.weight"] = linear(128, hidden)
            projection[f"{attention}.to_out.weight"] = linear(hidden, 64)
            projection |= norm(f"{forward}.0", hidden)
            projection[f"{forward}.1.weight"] = linear(4 * hidden, hidden)
            projection[f"{forward}.3.weight"] = linear(hidden, 4 * hidden)
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors if "attn2" in name]
    shapes = {f"{2 * i + 1}": tuple(layer.to_k.weight.shape) for i, layer in enumerate(layers)}
    attention = {f"{i}.to_{part}_ip.weight": 2 * linear(*shape) for i, shape in shapes.items() for part in "kv"}
    return {"image_proj": projection, "ip_adapter": attention}


def make_ip_adapter(source: Path, folder: Path, kind: str = "plain") -> Path:
    """An IP-Adapter in a file as it is published, beside its `image_encoder`."""
    from safetensors.torch import save_file

    make_image_encoder(folder / "image_encoder")
    state = ip_adapter_state(source, kind)
    flat = {f"{group}.{name}": tensor for group, tensors in state.items() for name, tensor in tensors.items()}
    save_file(flat, folder / f"ip-adapter-{kind}.safetensors")
    return folder / f"ip-adapter-{kind}.safetensors"


@pytest.fixture(scope="session")
def ip_adapter_maker():
    """(pipeline folder, folder, kind="plain") -> file, with `image_encoder/` beside it."""
    return make_ip_adapter


@pytest.fixture(scope="session")
def ip_adapter_weights():
    """(pipeline folder, kind="plain") -> {"image_proj", "ip_adapter"}."""
    return ip_adapter_state
