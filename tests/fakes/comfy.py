"""The interfaces of ComfyUI that our nodes use, as its documentation and nodes describe them; no network of its own.

Noise levels are sigma = sqrt((1 - a) / a), a sampler's latent is x / sqrt(a); `apply_model` turns what the network
gives into the denoised latent, by epsilon or v.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch


class ModelType(Enum):
    EPS = 1
    V_PREDICTION = 2


class LatentFormat:
    scale_factor = 1.0
    latent_channels = 4

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / self.scale_factor


class Config:
    def __init__(self, unet_config: dict):
        self.unet_config, self.latent_format = dict(unet_config), LatentFormat()


class SD15(Config):
    pass


class SDXL(Config):
    pass


class Sampling:
    def __init__(self, kind: ModelType):
        self.kind = kind

    def set_sigmas(self, sigmas: torch.Tensor) -> None:
        self.sigmas = sigmas.double()

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.double().log()[:, None] - self.sigmas.log()[None]).abs().argmin(dim=1)


class BaseModel(torch.nn.Module):
    def __init__(self, config: Config, model_type: ModelType = ModelType.EPS):
        super().__init__()
        assert config.unet_config["disable_unet_model_creation"]
        self.model_config, self.latent_format = config, config.latent_format
        self.model_sampling = Sampling(model_type)

    def apply_model(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, **more) -> torch.Tensor:
        wide = sigma.reshape(-1, 1, 1, 1).double()
        scaled, t = (x / (wide**2 + 1) ** 0.5).float(), self.model_sampling.timestep(sigma).float()
        out = self.diffusion_model(scaled, t, context=context, control=None, transformer_options={}, **more)
        if self.model_sampling.kind is ModelType.EPS:
            return x - out * wide
        return x / (wide**2 + 1) - out * wide / (wide**2 + 1) ** 0.5


class OfSdxl(BaseModel):
    pass


class ModelPatcher:
    def __init__(self, model: BaseModel, load_device, offload_device, size: int = 0):
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size

    def model_size(self) -> int:
        return sum(p.nelement() for p in self.model.parameters())

    def loaded_size(self) -> int:
        return 0

    def memory_required(self, shape) -> int:
        return self.model.memory_required(input_shape=shape)


def install(monkeypatch, models: Path) -> None:
    """Put `comfy` and `folder_paths` where our nodes import them from."""
    device = lambda: torch.device("cpu")  # noqa: E731
    paths = dict(
        models_dir=str(models),
        get_filename_list=lambda kind: sorted(path.name for path in (models / kind).glob("*")),
        get_full_path=lambda kind, name: str(models / kind / name),
    )
    parts = {
        "latent_formats": dict(LatentFormat=LatentFormat),
        "supported_models": dict(SD15=SD15, SDXL=SDXL),
        "model_base": dict(BaseModel=BaseModel, SDXL=OfSdxl, ModelType=ModelType),
        "model_patcher": dict(ModelPatcher=ModelPatcher),
        "model_management": dict(get_torch_device=device, unet_offload_device=device),
        "samplers": dict(ksampler=lambda name: SimpleNamespace(name=name)),
    }
    comfy = ModuleType("comfy")
    for name, values in parts.items():
        module = ModuleType(f"comfy.{name}")
        module.__dict__.update(values)
        setattr(comfy, name, module)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    folder_paths = ModuleType("folder_paths")
    folder_paths.__dict__.update(paths)
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
