"""The networks of a pipeline as thin torch modules with named tensors in and out.

The exporter traces these modules to ONNX and the eager engine runs them, so both have the same interface and weights.
Tensor names follow optimum's ONNX layout.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from ..bundle import Bundle, Component
from ..bundle.kinds import KINDS
from ..bundle.tensor_spec import TensorSpec
from ..errors import UserError
from ..files import write_json
from ..int8 import packed
from . import weight_files
from .config_files import built, read_config
from .control_networks import feature_specs, residual_shapes, residual_specs, unet_adapter_shapes
from .ip_adapter import unet as ip_adapter

FLOAT = "float32"
CLIP_SKIP = "clip_skip."  # and a number: outputs of a text encoder
# What a T2I-Adapter and a ControlNet can add, for the largest UNets; one tuple for the adapter, one for the skips.
_FEATURES = tuple(f"adapter_features_{i}" for i in range(4))
_RESIDUALS = tuple(f"down_residual_{i}" for i in range(12))


@dataclass(frozen=True)
class Network:
    """One network, ready to be traced or run.

    Attributes:
        name: component name (folder of the bundle).
        kind: key of `accel.bundle.kinds.KINDS`.
        module: takes the inputs by name, returns a tuple in the order of `outputs`; `module.model` holds the weights.
        inputs, outputs: float tensors are declared float32; `with_dtype` changes them together with the module.
    """

    name: str
    kind: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class TextEncoder(nn.Module):
    """input_ids [images, tokens] -> last_hidden_state, pooled output [, hidden_states.0 ...] [, clip_skip.1 ...].

    `clip_skip.N` is the hidden state N layers before the last one, normalised as that is.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model
        names = [spec.name for spec in outputs]
        self.hidden_states = any(name.startswith("hidden_states.") for name in names)
        self.skips = [int(name.removeprefix(CLIP_SKIP)) for name in names if name.startswith(CLIP_SKIP)]

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model(input_ids, output_hidden_states=self.hidden_states or bool(self.skips))
        pooled = out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output
        hidden = out.hidden_states[:-1] if self.hidden_states else ()
        norm = getattr(
            self.model, "text_model", self.model
        ).final_layer_norm  # transformers 5 has no such layer between
        return out.last_hidden_state, pooled, *hidden, *(norm(out.hidden_states[-1 - skip]) for skip in self.skips)


def _with_parameters(*names: str) -> Callable[[Callable], Callable]:
    """Name what a function takes as `**keywords`: torch.export goes by the signature, and lists inputs by its names."""

    def decorate(function: Callable) -> Callable:
        *own, _ = inspect.signature(function).parameters.values()
        more = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]
        function.__signature__ = inspect.Signature([*own, *more])
        return function

    return decorate


class UNet(nn.Module):
    """sample [batch, C, h, w], timestep [], encoder_hidden_states [batch, tokens, D], ... -> out_sample."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model

    @_with_parameters(*_FEATURES, *_RESIDUALS, "mid_residual")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        ip_adapter_scale: torch.Tensor | None = None,
        **control: torch.Tensor | None,
    ) -> tuple[torch.Tensor]:
        features = [control[name] for name in _FEATURES if control.get(name) is not None]
        residuals = tuple(control[name] for name in _RESIDUALS if control.get(name) is not None)
        added: dict[str, Any] = {}
        if text_embeds is not None:
            # diffusers concatenates it with the float32 sinusoids of the sizes; ONNX does not promote, torch does.
            added |= {"text_embeds": text_embeds.to(time_ids.dtype), "time_ids": time_ids}
        if image_embeds is not None:
            added["image_embeds"] = (image_embeds, ip_adapter_scale)
        return self.model(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added or None,
            down_intrablock_additional_residuals=features or None,
            down_block_additional_residuals=residuals or None,
            mid_block_additional_residual=control.get("mid_residual"),
            return_dict=False,
        )


class VaeDecoder(nn.Module):
    """latent_sample [images, 4, h, w] -> sample [images, 3, H, W] in [-1, 1]."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        return self.model.decode(latent_sample, return_dict=False)


class VaeEncoder(nn.Module):
    """sample [images, 3, H, W] -> latent_parameters (mean and log variance, or the latent of a tiny VAE)."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec] = ()):
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        if hasattr(self.model, "quant_conv"):
            moments = self.model.encoder(sample)
            return (self.model.quant_conv(moments) if self.model.quant_conv is not None else moments,)
        return self.model.encode(sample, return_dict=False)


def text_encoder(
    model: nn.Module,
    name: str = "text_encoder",
    *,
    hidden_states: bool = False,
    tokens: int = 77,
    clip_skips: Sequence[int] = (),
) -> Network:
    """The network of a CLIPTextModel or CLIPTextModelWithProjection.

    Args:
        hidden_states: whether it gives the hidden states of all layers too.
        clip_skips: how many layers before the last one further outputs lie.
    """
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    projected = type(model).__name__.endswith("WithProjection")
    pooled = ("text_embeds", model.config.projection_dim) if projected else ("pooler_output", width)
    outputs = [
        TensorSpec("last_hidden_state", FLOAT, ("images", tokens, width)),
        TensorSpec(pooled[0], FLOAT, ("images", pooled[1])),
    ]
    if hidden_states:
        outputs += [TensorSpec(f"hidden_states.{i}", FLOAT, ("images", tokens, width)) for i in range(layers)]
    outputs += [TensorSpec(f"{CLIP_SKIP}{skip}", FLOAT, ("images", tokens, width)) for skip in clip_skips]
    inputs = (TensorSpec("input_ids", "int64", ("images", tokens)),)
    return Network(name, "text_encoder", TextEncoder(model, outputs), inputs, tuple(outputs))


def unet(
    model: nn.Module,
    *,
    tokens: int = 77,
    adapter: int = 0,
    control: bool = False,
    time_ids: int = 6,
    image_tokens: int = 0,
) -> Network:
    """The network of a UNet2DConditionModel, with whatever extra conditioning its config asks for.

    Args:
        adapter: number of T2I-Adapter feature inputs (`down_intrablock_additional_residuals` in diffusers).
        control: whether it takes a ControlNet's residuals.
        time_ids: how many numbers SDXL's size conditioning has (arXiv 2307.01952, section 2.2): original size, crop
            corner and target size, two each; a refiner's has an aesthetic score in place of the target size.
        image_tokens: of the image encoder's hidden states, where the model has an IP-Adapter that takes those.
    """
    config = model.config
    latent = ("batch", config.in_channels, "latent_height", "latent_width")
    inputs = [
        TensorSpec("sample", FLOAT, latent),
        TensorSpec("timestep", FLOAT, ()),
        TensorSpec("encoder_hidden_states", FLOAT, ("batch", tokens, config.cross_attention_dim)),
    ]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - time_ids * config.addition_time_embed_dim
        inputs += [
            TensorSpec("text_embeds", FLOAT, ("batch", pooled)),
            TensorSpec("time_ids", FLOAT, ("batch", time_ids)),
        ]
    elif config.addition_embed_type is not None:
        raise UserError(
            f"UNets with addition_embed_type={config.addition_embed_type!r} are not supported",
            "Stable Diffusion 1.x, 2.x, SDXL and their students are",
        )
    if config.time_cond_proj_dim is not None:
        inputs.append(TensorSpec("timestep_cond", FLOAT, ("batch", config.time_cond_proj_dim)))
    inputs += ip_adapter.specs(model, image_tokens)
    inputs += feature_specs(unet_adapter_shapes(config)[:adapter], "batch")
    if control:
        inputs += residual_specs(residual_shapes(config), "batch")
    outputs = (TensorSpec("out_sample", FLOAT, ("batch", config.out_channels, "latent_height", "latent_width")),)
    return Network("unet", "unet", UNet(model), tuple(inputs), outputs)


def vae_decoder(model: nn.Module) -> Network:
    channels = model.config.latent_channels
    inputs = (TensorSpec("latent_sample", FLOAT, ("images", channels, "latent_height", "latent_width")),)
    outputs = (TensorSpec("sample", FLOAT, ("images", model.config.out_channels, "height", "width")),)
    return Network("vae_decoder", "vae_decoder", VaeDecoder(_only(model, "vae_decoder")), inputs, outputs)


def vae_encoder(model: nn.Module) -> Network:
    moments = model.config.latent_channels * (2 if hasattr(model, "quant_conv") else 1)
    inputs = (TensorSpec("sample", FLOAT, ("images", model.config.in_channels, "height", "width")),)
    outputs = (TensorSpec("latent_parameters", FLOAT, ("images", moments, "latent_height", "latent_width")),)
    return Network("vae_encoder", "vae_encoder", VaeEncoder(_only(model, "vae_encoder")), inputs, outputs)


def _only(model: nn.Module, kind: str) -> nn.Module:
    """The same model without the submodules that a component of this kind does not use; parameters are shared."""
    if not KINDS[kind].unused:
        return model
    part = copy.copy(model)
    part._modules = {k: None if k in KINDS[kind].unused else v for k, v in model._modules.items()}
    return part


def stored(bundle: Bundle, component: Component) -> nn.Module:
    """The module of a bundle's component, as `rebuild` makes it."""
    return rebuild(
        component.kind,
        bundle.file(f"{component.folder}/config.json"),
        bundle.file(component.weights),
        component.inputs,
        component.outputs,
        component.int8.get("layers"),
    )


def rebuild(
    kind: str,
    config_path: Path,
    weights: Path,
    inputs: tuple[TensorSpec, ...],
    outputs,
    int8_layers: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The module of a bundle's component: built from its config, weights memory-mapped from its safetensors file.

    The file's dtypes are kept exactly, so float16 and float32 modules come back as they were exported.

    Args:
        int8_layers: {name: traits} of the layers that are stored in int8.

    Raises:
        UserError: when config and weights do not belong together.
    """
    module = on_meta(kind, config_path, inputs, outputs)
    model = module.model
    try:
        if int8_layers:
            packed.place(model, int8_layers)
        model.load_state_dict(weight_files.read(weights), strict=True, assign=True)
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{weights.name} does not fit {config_path.parent.name}/{config_path.name}: {' '.join(first[:2])}",
            "export the model again",
        ) from None
    return module.eval().requires_grad_(False)


def on_meta(kind: str, config_path: Path, inputs: tuple[TensorSpec, ...], outputs) -> nn.Module:
    """The module of a bundle's component with parameters that have a shape and no memory, to count its work."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _build(kind, read_config(config_path, "the config"), config_path)
    module = resolve_name(KINDS[kind].wrapper)(model, outputs)
    return module.eval().requires_grad_(False)


def _build(kind: str, config: Mapping[str, Any], path: Path) -> nn.Module:
    row = KINDS[kind]
    named = config.get("architectures") or row.classes
    name = config.get("_class_name") or (named[0] if isinstance(named, (list, tuple)) else named)
    if name not in row.classes:
        raise UserError(f"a {kind} of class {name} is not supported", f"one of: {', '.join(row.classes)}")
    cls = getattr(import_module(row.module or row.library), name)
    if not hasattr(cls, "from_config"):  # transformers'
        return built(path, name, lambda: cls(cls.config_class.from_dict(dict(config))))
    # What only our own configs have, and diffusers would not know.
    own = {key: value for key, value in config.items() if key != ip_adapter.KEY}

    def build() -> nn.Module:
        model = _only(cls.from_config(own), kind)
        if kind == "unet" and ip_adapter.KEY in config:
            ip_adapter.rebuild(model, config[ip_adapter.KEY])
        return model

    return built(path, name, build)


def save_config(network: Network, folder: Path) -> None:
    """Write the network's config.json as diffusers and transformers do."""
    model = network.module.model
    if hasattr(model, "save_config"):
        model.save_config(folder)
        if ip_adapter.has(model):
            path = folder / "config.json"
            write_json(path, read_config(path, "the config") | {ip_adapter.KEY: ip_adapter.described(model)})
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)


def keep_float32(module: nn.Module, names: tuple[str, ...], fp32_output: tuple[str, ...] = ()) -> None:
    """Let the named submodules of a half-precision model compute in float32, casting at their borders.

    Args:
        fp32_output: those of them whose output stays float32, because it exceeds the range of less; its readers are
            named too.
    """

    def widen(_, args, kwargs):
        cast = lambda x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
        return tuple(map(cast, args)), {k: cast(v) for k, v in kwargs.items()}

    def narrow(dtype):
        return lambda _, args, kwargs, output: output.to(dtype)

    low = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), torch.float32)
    for name in names:
        part = module.get_submodule(name).float()
        part.register_forward_pre_hook(widen, with_kwargs=True)
        if name not in fp32_output:
            part.register_forward_hook(narrow(low), with_kwargs=True)
