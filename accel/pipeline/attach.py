"""Put the compiled parts of a bundle into an existing diffusers pipeline, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import nn

from ..bundle import Bundle
from ..bundle.kinds import KINDS
from ..engines import Engine, choose, load_engine
from ..engines.base import to_torch
from ..engines.placement import Place, check_move
from ..engines.resource import Resource
from ..errors import UserError
from ..models.lora.adapters import adapted
from ..models.same_network import check_same_network
from . import control

# Methods of a diffusers pipeline that change weights in a way that compiled networks follow.
_FOLLOWED = "load_lora_weights unload_lora_weights set_adapters delete_adapters enable_lora disable_lora".split()
# Those that compiled networks would ignore in silence, and the way out.
_EXPORT = "detach() first; then pipeline.save_pretrained(FOLDER), and accel export FOLDER compiles it with that"
_ADAPTERS = "set_adapters(names, scales) is enough: compiled networks run with adapters fused into their weights"
_REFUSED = {
    "fuse_lora": _ADAPTERS,
    "unfuse_lora": _ADAPTERS,
    "load_textual_inversion": _EXPORT,
    "unload_textual_inversion": _EXPORT,
    "load_ip_adapter": "detach() first",
    "enable_freeu": "detach() first: FreeU works inside the UNet, which was compiled without it",
    "enable_vae_tiling": "detach() first",
    "fuse_qkv_projections": "detach() first",
    "enable_model_cpu_offload": "detach() first",
    "enable_sequential_cpu_offload": "detach() first",
    "enable_group_offload": "detach() first",
}
# Methods of a network that would change the original behind a compiled one.
_CHANGES = frozenset(
    "load_lora_adapter unload_lora load_attn_procs add_adapter load_adapter set_adapter set_adapters enable_adapters "
    "disable_adapters delete_adapter delete_adapters enable_lora disable_lora fuse_lora unfuse_lora enable_freeu "
    "set_attn_processor resize_token_embeddings set_input_embeddings load_state_dict enable_tiling".split()
)
_MOVE = "detach() first, move the pipeline, and attach again"


class Attached(Resource):
    """The handle that `attach` returns. `detach()` restores the pipeline, as the end of a `with` does.

    Until then adapters (`load_lora_weights`, `set_adapters`, ...) are followed, what compiled networks cannot follow
    is refused (`to` another device or dtype, FreeU, ...), and `save_pretrained` writes the original networks.

    Attributes:
        engines: the loaded engines by component name.
    """

    what, again = "attachment", "accel.attach(PIPELINE, BUNDLE) makes one"

    def __init__(
        self,
        pipeline: Any,
        bundle: Bundle,
        originals: dict[str, Any],
        compiled: dict[str, _Compiled],
        engines: dict[str, Engine],
    ):
        self._pipeline, self._bundle, self._originals, self._compiled = pipeline, bundle, originals, compiled
        self.engines, self._within = engines, False
        self._put(compiled)
        guards = {"to": self._to, "save_pretrained": self._save_pretrained}
        guards |= {name: partial(_refuse, name) for name in _REFUSED if hasattr(pipeline, name)}
        guards |= {name: partial(self._follow, name) for name in _FOLLOWED if hasattr(pipeline, name)}
        pipeline.__dict__.update(guards)
        self._guards = tuple(guards)

    def detach(self) -> None:
        """Put the original modules back and give the engines' memory back; a second call does nothing."""
        self.close()

    def release(self) -> None:
        self._put(self._originals)
        for name in self._guards:
            self._pipeline.__dict__.pop(name, None)
        for engine in self.engines.values():
            engine.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<Attached to {type(self._pipeline).__name__} (detached)>"
        rows = "".join(f"\n  {name:<12} {engine.description}" for name, engine in self.engines.items())
        return f"<Attached to {type(self._pipeline).__name__}{rows}>"

    def _put(self, modules: Mapping[str, Any]) -> None:
        """Make these the networks of the pipeline."""
        for slot, module in modules.items():
            original = self._originals[slot]
            if not self._compiled[slot].keeps_class:
                setattr(self._pipeline, slot, module)
            elif module is original:
                original.__dict__.pop("forward", None)
            else:
                original.__dict__["forward"] = module.forward

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        places = {name: Place.of_module(module) for name, module in self._originals.items()}
        check_move("a pipeline with compiled networks", places, args, kwargs, _MOVE)
        return self._pipeline

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_originals("save_pretrained", *args, **kwargs)

    def _with_originals(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the pipeline, as it is without us; so are those that it calls itself."""
        method, outermost = partial(getattr(type(self._pipeline), name), self._pipeline), not self._within
        if not outermost:
            return method(*args, **kwargs)
        self._within = True
        self._put(self._originals)
        try:
            return method(*args, **kwargs)
        finally:
            self._put(self._compiled)
            self._within = False

    def _follow(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method that changes the adapters, and the same change in the engines."""
        try:
            return self._with_originals(name, *args, **kwargs)
        finally:
            if not self._within:
                for slot, compiled in self._compiled.items():
                    compiled.follow(partial(adapted, self._originals[slot], self._bundle))
                for compiled in self._compiled.values():
                    compiled.check_followed()


def _refuse(name: str, *_: Any, **__: Any) -> NoReturn:
    raise UserError(f"{name} would not reach the compiled networks of this pipeline", _REFUSED[name])


def attach(pipeline: Any, bundle: str | Path | Bundle, engine: str = "auto", **options: Any) -> Attached:
    """Let a diffusers pipeline run on a bundle's compiled networks. Everything else of the pipeline stays as it is.

    Active adapters of the pipeline (LoRA and what else peft merges) are fused for the engines.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline of diffusers.
        bundle: a bundle, or its folder, exported from the same model.
        engine, options: as in `accel.load`.

    Returns:
        A handle whose `detach()` undoes it.

    Raises:
        UserError: when the pipeline's networks are not those of the bundle (other configs or weights), are compiled
            already, or have what no weight shows (FreeU, hooks, textual inversion).
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    if engine != "auto":
        choose(engine)  # before anything is loaded
    slots = {
        slot: component
        for kind in KINDS.values()
        for slot, component in zip(kind.slots, kind.names, strict=False)
        if getattr(pipeline, slot, None) is not None and component in bundle.manifest.components
    }
    if "unet" not in slots:
        fix = "attach to a Stable Diffusion or SDXL pipeline of diffusers"
        raise UserError(f"{type(pipeline).__name__} and {bundle.path} have no UNet in common", fix)
    originals = {slot: getattr(pipeline, slot) for slot in slots}
    for slot, module in originals.items():
        patched = getattr(module.__dict__.get("forward"), "__self__", None)
        if isinstance(module, _Compiled) or isinstance(patched, _Compiled):
            fix = "detach() the first attachment; it is a context manager too: with accel.attach(...):"
            raise UserError(f"the {slot} of this {type(pipeline).__name__} is attached to a bundle already", fix)
    for slot, component in slots.items():
        check_same_network(originals[slot], bundle, component)
    changed = {component: adapted(originals[slot], bundle, component) for slot, component in slots.items()}
    more: dict[str, dict[str, Any]] = {name: {"weights": made} if made else {} for name, made in changed.items()}
    engines = {name: load_engine(bundle, name, engine, **options, **more[name]) for name in slots.values()}
    compiled = {
        slot: resolve_name(KINDS[bundle.component(component).kind].stand_in)(originals[slot], engines[component])
        for slot, component in slots.items()
    }
    for component, stand_in in zip(slots.values(), compiled.values(), strict=True):
        stand_in._hidden.changed = bool(changed[component])
    return Attached(pipeline, bundle, originals, compiled, engines)


class _Compiled(nn.Module):
    """A stand-in for a module: same config, dtype and device as the original, computed by an engine."""

    keeps_class = False

    def __init__(self, original: nn.Module, engine: Engine):
        super().__init__()
        self.config = original.config
        self.dtype = original.dtype
        self.device = original.device
        # Kept out of the module tree: its weights are not this module's, and must not be moved or saved with it.
        self._hidden = SimpleNamespace(original=original, engine=engine, changed=False, refusal=None)

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
        check_move("a compiled network", {type(self).__name__: Place.of_module(self)}, args, kwargs, _MOVE)
        return self

    def call(self, **feeds: Any) -> dict[str, torch.Tensor]:
        """Run the engine on torch tensors; casts to its dtypes and back to the original module's."""
        engine = self._hidden.engine
        self.check_followed()
        dtypes = {spec.name: getattr(torch, spec.dtype) for spec in engine.component.inputs}
        outputs = engine(**{k: v.to(dtypes[k]) if torch.is_tensor(v) else v for k, v in feeds.items()})
        return {name: to_torch(value, str(self.device)).to(self.dtype) for name, value in outputs.items()}


class CompiledUNet(_Compiled):
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
        feeds |= {k: v for k, v in (added_cond_kwargs or {}).items() if k in names}
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

    def _zeros(self, sample: torch.Tensor, feeds: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Zeros for the control inputs that this pipeline does not feed."""
        missing = [
            spec
            for spec in self._hidden.engine.component.inputs
            if spec.name not in feeds and spec.name.startswith(control.PREFIXES)
        ]
        sizes = {"batch": len(sample)} | control.inner_sizes(sample.shape[-2:])
        return {spec.name: torch.zeros(spec.concrete(sizes), device=sample.device) for spec in missing}


class CompiledAdapter(_Compiled):
    def forward(self, x):
        return list(self.call(control_image=x).values())


class CompiledControlNet(_Compiled):
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


class CompiledVae(_Compiled):
    """Decodes on the engine; encoding stays with the original."""

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


class CompiledTextEncoder(_Compiled):
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
