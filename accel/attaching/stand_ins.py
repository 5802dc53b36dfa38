"""Stand-ins for the networks of a diffusers pipeline: same config, dtype and device, computed by an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..engines import Engine
from ..engines.base import to_torch
from ..engines.placement import Place, check_move
from ..errors import UserError
from ..pipeline import control
from ..pipeline.input_images import CONTROL_INPUTS

# Methods of a network that would change the original behind a compiled one.
_CHANGES = frozenset(
    "load_lora_adapter unload_lora load_attn_procs add_adapter load_adapter set_adapter set_adapters enable_adapters "
    "disable_adapters delete_adapter delete_adapters enable_lora disable_lora fuse_lora unfuse_lora enable_freeu "
    "set_attn_processor resize_token_embeddings set_input_embeddings load_state_dict enable_tiling".split()
)
MOVE = "detach() first, move the pipeline, and attach again"


class Compiled(nn.Module):
    """A stand-in for a module: same config, dtype and device as the original, computed by an engine."""

    keeps_class = False
    alone = True  # nothing of the original's own is computed while it stands in

    def __init__(self, original: nn.Module, engine: Engine):
        super().__init__()
        self.config = original.config
        # Kept out of the module tree: its weights are not this module's, and must not be moved or saved with it.
        self._hidden = SimpleNamespace(original=original, engine=engine, changed=False, refusal=None, place=None)

    @property
    def device(self) -> torch.device:
        """Where the original is now, or was before `offload`; outputs are put there."""
        return self._hidden.place or self._hidden.original.device

    def offload(self) -> None:
        """Put the original's weights into main memory."""
        self._hidden.place = self._hidden.original.device
        self._hidden.original.to("cpu")

    def bring_back(self) -> None:
        """Put the original's weights back where they were."""
        self._hidden.original.to(self._hidden.place)
        self._hidden.place = None

    @property
    def dtype(self) -> torch.dtype:
        return self._hidden.original.dtype

    def __getattr__(self, name: str) -> Any:
        if name == "_hidden":
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _CHANGES:
                raise UserError(
                    f"{name} would not reach the compiled network", "the pipeline's own load_lora_weights or detach()"
                ) from None
            return getattr(self.__dict__["_hidden"].original, name)

    def follow(self, adapted: Callable[[str], Mapping[str, Any]]) -> None:
        """Let the engine run with the adapters that the original has now; where it cannot, `check_followed` says so.

        Args:
            adapted: component -> the tensors that the adapters change.
        """
        hidden = self._hidden
        try:
            tensors = adapted(hidden.engine.component.name)
            if tensors or hidden.changed or hidden.refusal:
                hidden.engine.set_weights(tensors)
            hidden.changed, hidden.refusal = bool(tensors), None
        except UserError as error:
            hidden.refusal = error

    def check_followed(self) -> None:
        """Draw no image without the adapters that the pipeline has."""
        if self._hidden.refusal:
            raise self._hidden.refusal

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself, where it is there already."""
        check_move("a compiled network", {type(self).__name__: Place.of_module(self)}, args, kwargs, MOVE)
        return self

    def call(self, **feeds: Any) -> dict[str, torch.Tensor]:
        """Run the engine on torch tensors; casts to its dtypes and back to the original module's."""
        engine = self._hidden.engine
        self.check_followed()
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in engine.component.inputs}
        outputs = engine(**{k: v.to(dtypes[k]) if torch.is_tensor(v) else v for k, v in feeds.items()})
        return {name: to_torch(value, str(self.device)).to(self.dtype) for name, value in outputs.items()}


class CompiledUNet(Compiled):
    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        timestep_cond=None,
        added_cond_kwargs=None,
        down_intrablock_additional_residuals=None,
        down_block_additional_residuals=None,
        mid_block_additional_residual=None,
        return_dict=True,
        cross_attention_kwargs=None,
        **unsupported,
    ):
        given = [name for name, value in unsupported.items() if value is not None]
        given += ["cross_attention_kwargs"] if cross_attention_kwargs else []
        if given:
            fix = "detach() first, or do without that feature; a LoRA's scale: pipeline.set_adapters(names, scales)"
            raise UserError(f"the compiled UNet has no input for {', '.join(given)}", fix)
        feeds = {
            "sample": sample,
            "timestep": torch.as_tensor(timestep).reshape(()),
            "encoder_hidden_states": encoder_hidden_states,
        }
        names = {spec.name for spec in self._hidden.engine.component.inputs}
        if timestep_cond is not None:
            feeds["timestep_cond"] = timestep_cond
        added = dict(added_cond_kwargs or {})
        feeds |= self._image_prompt(added.pop("image_embeds", None), len(sample), sample.device)
        feeds |= {k: v for k, v in added.items() if k in names}
        for i, feature in enumerate(down_intrablock_additional_residuals or []):
            feeds[f"adapter_features_{i}"] = feature
        for i, residual in enumerate(down_block_additional_residuals or []):
            feeds[f"down_residual_{i}"] = residual
        if mid_block_additional_residual is not None:
            feeds["mid_residual"] = mid_block_additional_residual
        feeds |= self._zeros(sample, feeds)
        out = self.call(**feeds)["out_sample"]
        if not return_dict:
            return (out,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=out)

    def _image_prompt(self, embeds: Any, rows: int, device: Any) -> dict[str, torch.Tensor]:
        """The inputs of the IP-Adapter: what the pipeline made of its pictures, and the scale that it has now.

        Args:
            embeds: a list with a tensor [batch, pictures, ...] for each adapter; None where no picture was given.
        """
        spec = next((s for s in self._hidden.engine.component.inputs if s.name == "image_embeds"), None)
        if spec is None:
            if embeds is not None:
                fix = "detach() first, or export again with --ip-adapter FILE --image-encoder FOLDER"
                raise UserError("the compiled UNet has no input for image_embeds", fix)
            return {}
        if embeds is None:
            zeros = torch.zeros(spec.concrete({"batch": rows, "prompt_images": 1}), device=device)
            return {"image_embeds": zeros, "ip_adapter_scale": torch.zeros(rows, device=device)}
        (embed,) = embeds if isinstance(embeds, (list, tuple)) else [embeds.unsqueeze(1)]
        scales = {
            scale if isinstance(scale, (int, float)) else None
            for processor in self._hidden.original.attn_processors.values()
            for scale in getattr(processor, "scale", ())
        }
        if len(scales) != 1 or None in scales:
            raise UserError(
                "the IP-Adapter has other scales in some blocks than in others, and the compiled UNet takes one",
                "pipeline.set_ip_adapter_scale(0.6): one number; or detach() first",
            )
        return {"image_embeds": embed, "ip_adapter_scale": torch.full((rows,), float(scales.pop()), device=device)}

    def _zeros(self, sample: torch.Tensor, feeds: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Zeros for the control inputs that this pipeline does not feed."""
        missing = [
            spec
            for spec in self._hidden.engine.component.inputs
            if spec.name not in feeds and spec.name.startswith(CONTROL_INPUTS)
        ]
        sizes = {"batch": len(sample)} | control.inner_sizes(sample.shape[-2:])
        return {spec.name: torch.zeros(spec.concrete(sizes), device=sample.device) for spec in missing}


class CompiledAdapter(Compiled):
    def forward(self, x):
        return list(self.call(control_image=x).values())


class CompiledControlNet(Compiled):
    alone = False
    keeps_class = True  # diffusers asks for the class by name: the module stays, and only its `forward` is replaced

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states,
        controlnet_cond,
        conditioning_scale=1.0,
        guess_mode=False,
        added_cond_kwargs=None,
        return_dict=True,
        **unsupported,
    ):
        if guess_mode or any(value is not None for value in unsupported.values()):
            raise UserError("the compiled ControlNet has no guess mode and no further inputs", "detach() first")
        names = {spec.name for spec in self._hidden.engine.component.inputs}
        added = {k: v for k, v in (added_cond_kwargs or {}).items() if k in names}
        *down, middle = (
            value * conditioning_scale
            for value in self.call(
                sample=sample,
                timestep=torch.as_tensor(timestep).reshape(()),
                control_image=controlnet_cond,
                encoder_hidden_states=encoder_hidden_states,
                **added,
            ).values()
        )
        if not return_dict:
            return tuple(down), middle
        from diffusers.models.controlnets.controlnet import ControlNetOutput

        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=middle)


class CompiledVae(Compiled):
    """Decodes on the engine; encoding stays with the original."""

    alone = False

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Any dtype will do: SDXL's pipelines ask for float32 around the decoding, which keeps to the engine's own."""
        others = {name: value for name, value in kwargs.items() if name != "dtype"}
        return super().to(*(value for value in args if not isinstance(value, torch.dtype)), **others)

    def decode(self, z, return_dict=True, generator=None):
        out = self.call(latent_sample=z)["sample"]
        if not return_dict:
            return (out,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=out)


class CompiledImageEncoder(Compiled):
    alone = False
    keeps_class = True  # diffusers reads the dtype of its parameters

    def forward(self, pixel_values, output_hidden_states=None, return_dict=True, **_):
        ((name, value),) = self.call(pixel_values=pixel_values).items()
        if bool(output_hidden_states) != name.startswith("hidden_states."):
            what = "hidden states" if output_hidden_states else "embedding"
            raise UserError(
                f"this bundle's image encoder gives no {what}: its IP-Adapter is of another kind", "detach()"
            )
        if output_hidden_states:  # of which diffusers reads the last but one
            return SimpleNamespace(hidden_states=(value, None))
        return SimpleNamespace(image_embeds=value)


class CompiledTextEncoder(Compiled):
    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, return_dict=True, **_):
        if attention_mask is not None:
            raise UserError("the compiled text encoder takes no attention mask", "detach() first")
        out = self.call(input_ids=input_ids)
        hidden = [out[name] for name in out if name.startswith("hidden_states.")]
        if output_hidden_states and not hidden:
            raise UserError(
                "this bundle's text encoder has no hidden states (clip_skip needs them)", "call without clip_skip"
            )
        first = "text_embeds" if "text_embeds" in out else "last_hidden_state"
        return _TextOutput(out, first, [*hidden, out["last_hidden_state"]])


class _TextOutput(tuple):
    """Indexable like transformers' output in the positions diffusers reads: [0], .hidden_states, the last item."""

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor | None
    text_embeds: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...]

    def __new__(cls, out: dict[str, torch.Tensor], first: str, hidden: list[torch.Tensor]):
        pooled = out.get("pooler_output", out.get("text_embeds"))
        second = out["last_hidden_state"] if first == "text_embeds" else pooled
        self = super().__new__(cls, (out[first], second, tuple(hidden)))
        self.last_hidden_state, self.pooler_output = out["last_hidden_state"], pooled
        self.text_embeds, self.hidden_states = out.get("text_embeds"), tuple(hidden)
        return self
