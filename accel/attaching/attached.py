"""Put the compiled parts of a bundle into an existing diffusers pipeline, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from ..bundle import Bundle
from ..bundle.kinds import KINDS
from ..engines import Engine, choose, load_engine
from ..engines.placement import Place, check_move
from ..engines.resource import Resource
from ..errors import UserError
from ..models.lora.adapters import adapted
from ..models.same_network import check_same_network
from .stand_ins import MOVE, Compiled

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
    "unload_ip_adapter": "detach() first; without ip_adapter_image the adapter has no part in an image",
    "enable_freeu": "detach() first: FreeU works inside the UNet, which was compiled without it",
    "enable_vae_tiling": "detach() first",
    "fuse_qkv_projections": "detach() first",
    "enable_model_cpu_offload": "detach() first",
    "enable_sequential_cpu_offload": "detach() first",
    "enable_group_offload": "detach() first",
}


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
        compiled: dict[str, Compiled],
        engines: dict[str, Engine],
        offload: bool = False,
    ):
        self._pipeline, self._bundle, self._originals, self._compiled = pipeline, bundle, originals, compiled
        self.engines, self._within = engines, False
        self._offloaded = [slot for slot, stand_in in compiled.items() if offload and stand_in.alone]
        for slot in self._offloaded:
            compiled[slot].offload()
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
        for slot in self._offloaded:
            self._compiled[slot].bring_back()
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
        places = {name: Place.of_module(module) for name, module in self._compiled.items()}
        check_move("a pipeline with compiled networks", places, args, kwargs, MOVE)
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


def _networks(pipeline: Any, bundle: Bundle) -> tuple[dict[str, Any], dict[str, str]]:
    """Slot -> network of the pipeline, and slot -> component, of all that the bundle has."""
    originals, slots = {}, {}
    for kind in KINDS.values():
        for slot, component in zip(kind.slots, kind.names, strict=False):
            found = getattr(pipeline, slot, None)
            several = getattr(found, "nets", None)  # of diffusers' MultiControlNetModel
            named = {slot: (component, found)}
            if several is not None:
                rows = enumerate(zip(kind.names, several, strict=False))
                named = {f"{slot}.nets.{i}": (name, module) for i, (name, module) in rows}
            for place, (name, module) in named.items():
                if module is not None and name in bundle.manifest.components:
                    originals[place], slots[place] = module, name
    return originals, slots


def attach(
    pipeline: Any, bundle: str | Path | Bundle, engine: str = "auto", *, offload: bool = False, **options: Any
) -> Attached:
    """Let a diffusers pipeline run on a bundle's compiled networks. Everything else of the pipeline stays as it is.

    Active adapters of the pipeline (LoRA and what else peft merges) are fused for the engines.

    Args:
        pipeline: a Stable Diffusion or SDXL pipeline of diffusers.
        bundle: a bundle, or its folder, exported from the same model.
        engine, options: as in `accel.load`.
        offload: keep the weights of the networks that engines replace whole (UNet, text encoders) in main memory until
            `detach()`: on a GPU they would lie there twice.

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
    originals, slots = _networks(pipeline, bundle)
    if "unet" not in slots:
        fix = "attach to a Stable Diffusion or SDXL pipeline of diffusers"
        raise UserError(f"{type(pipeline).__name__} and {bundle.path} have no UNet in common", fix)
    for slot, module in originals.items():
        patched = getattr(module.__dict__.get("forward"), "__self__", None)
        if isinstance(module, Compiled) or isinstance(patched, Compiled):
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
    return Attached(pipeline, bundle, originals, compiled, engines, offload)
