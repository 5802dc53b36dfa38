"""The kinds of components that a bundle can hold, one entry each: to add a kind, add its entry.

What an entry names as "module:name" is looked up when it is used, so that reading a bundle loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of component.

    Attributes:
        names: the components that can be of this kind; the first name is the kind's own.
        wrapper: torch module with named inputs and outputs around a model, made as (model, output specs).
        network: (source, name, `UNetInputs`) -> the `Network` to export; see `accel.models.source_networks`.
        classes: classes that the model may have; the first one where its config names none.
        library: the package of these classes, diffusers or transformers.
        part: the part of a diffusers pipeline that the model is; "" for the one of the component's own name.
        unused: submodules of that part which this component does without.
        use: when a pipeline runs it: "always" (without it there is no image), "if present" (in every image, where the
            bundle has it), or "on demand" (loaded when it is first used).
        control: whether it adds to the UNet; such a component is exported wherever the source has it.
        slots: attributes of a diffusers pipeline that `accel.attach` replaces, one for each of `names`.
        stand_in: what replaces them, made as (original module, engine).
    """

    names: tuple[str, ...]
    wrapper: str
    network: str
    classes: tuple[str, ...]
    library: str = "diffusers"
    part: str = ""
    unused: tuple[str, ...] = ()
    use: str = "on demand"
    control: bool = False
    slots: tuple[str, ...] = ()
    stand_in: str = ""


_VAES = ("AutoencoderKL", "AutoencoderTiny")
# In the order in which an image needs them.
_KINDS = (
    Kind(
        names=("text_encoder", "text_encoder_2"),
        wrapper="accel.models.networks:TextEncoder",
        network="accel.models.source_networks:text_encoder",
        classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        library="transformers",
        use="always",
        slots=("text_encoder", "text_encoder_2"),
        stand_in="accel.pipeline.attach:CompiledTextEncoder",
    ),
    Kind(
        names=("t2i_adapter",),
        wrapper="accel.models.control_networks:T2IAdapter",
        network="accel.models.source_networks:t2i_adapter",
        classes=("T2IAdapter",),
        use="if present",
        control=True,
        slots=("adapter",),
        stand_in="accel.pipeline.attach:CompiledAdapter",
    ),
    Kind(
        names=("controlnet",),
        wrapper="accel.models.control_networks:ControlNet",
        network="accel.models.source_networks:controlnet",
        classes=("ControlNetModel",),
        use="if present",
        control=True,
        slots=("controlnet",),
        stand_in="accel.pipeline.attach:CompiledControlNet",
    ),
    Kind(
        names=("unet",),
        wrapper="accel.models.networks:UNet",
        network="accel.models.source_networks:unet",
        classes=("UNet2DConditionModel",),
        use="always",
        slots=("unet",),
        stand_in="accel.pipeline.attach:CompiledUNet",
    ),
    Kind(
        names=("vae_decoder",),
        wrapper="accel.models.networks:VaeDecoder",
        network="accel.models.source_networks:vae_decoder",
        classes=_VAES,
        part="vae",
        unused=("encoder", "quant_conv"),
        use="always",
        slots=("vae",),
        stand_in="accel.pipeline.attach:CompiledVae",
    ),
    Kind(
        names=("vae_encoder",),
        wrapper="accel.models.networks:VaeEncoder",
        network="accel.models.source_networks:vae_encoder",
        classes=_VAES,
        part="vae",
        unused=("decoder", "post_quant_conv"),
    ),
)
KINDS: dict[str, Kind] = {kind.names[0]: kind for kind in _KINDS}


def kind_of(component: str) -> Kind:
    """The kind of a component of this name."""
    return next(kind for kind in KINDS.values() if component in kind.names)


def control_components() -> tuple[str, ...]:
    """The components that add to the UNet: `t2i_adapter`, `controlnet`."""
    return tuple(name for name, kind in KINDS.items() if kind.control)
