"""A bundle's UNet as a MODEL of ComfyUI."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from accel import UserError

from .lent import Lent

_FREQUENCIES = 128  # of the sinusoidal embedding of each of SDXL's six numbers
_LOWEST = 10000.0 ** (-(_FREQUENCIES - 1) / _FREQUENCIES)


class Unet:
    """What ComfyUI calls as `model.diffusion_model`."""

    dtype = torch.float32

    def __init__(self, lent: Lent):
        self.lent = lent

    def __call__(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """Noise or v of latents.

        Args:
            x: float32 [B, C, h, w], scaled as the network's sampler passes it.
            timesteps: [B], of the training's noise schedule.
            context: text embeddings [B, 77, D].
            y: SDXL's pooled text and sizes, [B, P + 6 * 256].
            control, transformer_options: what patches the inner layers, which a compiled network has not.

        Raises:
            UserError: for a patch, a ControlNet, or a context of another length.
        """
        given = {
            **(transformer_options or {}).get("patches", {}),
            **(transformer_options or {}).get("patches_replace", {}),
        }
        if control or given:
            what = "a ControlNet" if control else f"a patch of {next(iter(given))}"
            raise UserError(f"{what} needs the inner layers, which a compiled network has not", "take that node out")
        engine = self.lent.pipeline.engines["unet"]
        feeds: dict[str, Any] = {"sample": x, "encoder_hidden_states": context}
        if y is not None and any(spec.name == "time_ids" for spec in engine.component.inputs):
            pooled = y.shape[1] - 12 * _FREQUENCIES
            feeds |= {"text_embeds": y[:, :pooled], "time_ids": _numbers(y[:, pooled:])}
        rows = timesteps.reshape(-1)
        if bool((rows == rows[0]).all()):
            return self._run(engine, feeds, rows[0]).to(x)
        made = [self._run(engine, {n: v[i : i + 1] for n, v in feeds.items()}, t) for i, t in enumerate(rows)]
        return torch.cat(made).to(x)

    @staticmethod
    def _run(engine: Any, feeds: dict[str, torch.Tensor], timestep: torch.Tensor) -> torch.Tensor:
        kinds = {spec.name: spec.dtype for spec in engine.component.inputs}
        arrays = {name: value.detach().float().cpu().numpy().astype(kinds[name]) for name, value in feeds.items()}
        found = engine(**arrays, timestep=np.asarray(float(timestep), kinds["timestep"]))["out_sample"]
        return torch.as_tensor(np.asarray(found.cpu() if hasattr(found, "cpu") else found))

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: ComfyUI has no weights to save or to patch here."""
        return {}

    def load_state_dict(self, *_: Any, **__: Any) -> tuple[list[str], list[str]]:
        return [], []


def _numbers(embedded: torch.Tensor) -> torch.Tensor:
    """The six sizes behind their sinusoidal embeddings [B, 6 * 256], by the angle of the lowest frequency."""
    rows = embedded.reshape(embedded.shape[0], 6, 2, _FREQUENCIES).double()
    return torch.atan2(rows[:, :, 1, -1], rows[:, :, 0, -1]).div(_LOWEST).round().float()


def model(lent: Lent) -> Any:
    """The MODEL: ComfyUI's own model class around the engine, in a patcher that tells the true size."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    manifest = lent.manifest
    sdxl = manifest.family == "sdxl"
    kind = comfy.supported_models.SDXL if sdxl else comfy.supported_models.SD15
    config = kind({"adm_in_channels": 2816 if sdxl else None})
    config.unet_config["disable_unet_model_creation"] = True
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.scale_factor = float(manifest.pipeline["scaling_factor"])
    config.latent_format.latent_channels = manifest.pipeline["latent_channels"]
    schedule = lent.pipeline.schedule
    v = str(schedule.config.get("prediction_type", "epsilon")) == "v_prediction"
    base = comfy.model_base.SDXL if sdxl else comfy.model_base.BaseModel
    made = base(config, model_type=getattr(comfy.model_base.ModelType, "V_PREDICTION" if v else "EPS"))
    made.model_sampling.set_sigmas(torch.as_tensor(sigmas_of(lent)))
    made.diffusion_model = Unet(lent)
    size = lent.bytes_of("unet")
    made.memory_required = lambda *_, **__: 0  # the engine's activations are its own
    devices = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()

    class Patcher(comfy.model_patcher.ModelPatcher):
        """Its weights lie in an engine: all of them, always."""

        def model_size(self) -> int:
            return size

        def loaded_size(self) -> int:
            return size

        def partially_unload(self, *_: Any, **__: Any) -> int:
            return 0

        def add_patches(self, patches: Any, *_: Any, **__: Any) -> list[str]:
            if patches:
                raise UserError("ComfyUI's LoRA loader cannot reach a compiled network", "use the node Accel LoRA")
            return []

    return Patcher(made, load_device=devices[0], offload_device=devices[1], size=size)


def sigmas_of(lent: Lent) -> np.ndarray:
    """Noise levels sqrt((1 - a) / a) of the training timesteps, float32 [T]."""
    alphas = np.asarray(lent.pipeline.schedule.alphas_cumprod, np.float64)
    return np.sqrt((1 - alphas) / alphas).astype(np.float32)
