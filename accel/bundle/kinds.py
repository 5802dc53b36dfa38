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
        network: (source, name, `UNetInputs`) -> the `Network` to export; "" for the function of the kind's name in
            `accel.models.source_networks`.
        classes: classes that the model may have; the first one where its config names none.
        library: the package of these classes, as model_index.json calls it: diffusers, transformers, or the name of
            a pipeline of diffusers.
        module: where they are, if not at the top of that package.
        part: the part of a diffusers pipeline that the model is; "" for the one of the component's own name.
        unused: submodules of that part which this component does without.
        use: when a pipeline runs it: "always" (without it there is no image), "if present" (in every image, where the
            bundle has it), "afterwards" (on every image, where the bundle has it and nobody switched it off), "on
            demand" (loaded when it is first used), or "alone" (it draws images of classes, with no other component).
        adds: what it adds to the UNet, "control" or "image prompt"; such a component is exported, unasked, wherever the
            source has it.
        on_request: whether it is exported only where it is asked for by an option of its own.
        float32: whether it stays float32, whatever the precision of the others.
        slots: attributes of a diffusers pipeline that `accel.attach` replaces, one for each of `names`; or one that
            holds several networks (a MultiControlNetModel).
        stand_in: what replaces them, made as (original module, engine).
    """

    names: tuple[str, ...]
    wrapper: str
    classes: tuple[str, ...]
    network: str = ""
    library: str = "diffusers"
    module: str = ""
    part: str = ""
    unused: tuple[str, ...] = ()
    use: str = "on demand"
    adds: str = ""
    on_request: bool = False
    float32: bool = False
    slots: tuple[str, ...] = ()
    stand_in: str = ""


DENOISER = "denoiser"
_MODELS, _ATTACH = "accel.models", "accel.attaching.stand_ins"
_VAES = ("AutoencoderKL", "AutoencoderTiny")
# In the order in which an image needs them.
_KINDS = (
    Kind(
        names=("text_encoder", "text_encoder_2"),
        wrapper=f"{_MODELS}.networks:TextEncoder",
        classes=("CLIPTextModel", "CLIPTextModelWithProjection"),
        library="transformers",
        use="always",
        slots=("text_encoder", "text_encoder_2"),
        stand_in=f"{_ATTACH}:CompiledTextEncoder",
    ),
    Kind(
        names=("image_encoder",),
        wrapper=f"{_MODELS}.ip_adapter.image_encoder:ImageEncoder",
        classes=("CLIPVisionModelWithProjection",),
        library="transformers",
        adds="image prompt",
        slots=("image_encoder",),
        stand_in=f"{_ATTACH}:CompiledImageEncoder",
    ),
    Kind(
        names=("t2i_adapter",),
        wrapper=f"{_MODELS}.control_networks:T2IAdapter",
        classes=("T2IAdapter",),
        use="if present",
        adds="control",
        slots=("adapter",),
        stand_in=f"{_ATTACH}:CompiledAdapter",
    ),
    Kind(
        names=("controlnet", "controlnet_1", "controlnet_2"),
        wrapper=f"{_MODELS}.control_networks:ControlNet",
        classes=("ControlNetModel",),
        use="if present",
        adds="control",
        slots=("controlnet",),
        stand_in=f"{_ATTACH}:CompiledControlNet",
    ),
    Kind(
        names=("unet",),
        wrapper=f"{_MODELS}.networks:UNet",
        classes=("UNet2DConditionModel",),
        use="always",
        slots=("unet",),
        stand_in=f"{_ATTACH}:CompiledUNet",
    ),
    Kind(
        names=("vae_decoder",),
        wrapper=f"{_MODELS}.networks:VaeDecoder",
        classes=_VAES,
        part="vae",
        unused=("encoder", "quant_conv"),
        use="always",
        slots=("vae",),
        stand_in=f"{_ATTACH}:CompiledVae",
    ),
    Kind(
        names=("safety_checker",),
        wrapper="accel.safety.network:SafetyChecker",
        classes=("StableDiffusionSafetyChecker",),
        library="stable_diffusion",
        module="diffusers.pipelines.stable_diffusion.safety_checker",
        use="afterwards",
        on_request=True,
        float32=True,
    ),
    Kind(
        names=("vae_encoder",),
        wrapper=f"{_MODELS}.networks:VaeEncoder",
        classes=_VAES,
        part="vae",
        unused=("decoder", "post_quant_conv"),
    ),
    Kind(
        names=(DENOISER,),
        wrapper=f"{_MODELS}.edm.network:Denoiser",
        network=f"{_MODELS}.edm.network:denoiser",
        classes=("UNet2DModel",),
        use="alone",
    ),
)
KINDS: dict[str, Kind] = {kind.names[0]: kind for kind in _KINDS}


def kind_of(component: str) -> Kind:
    """The kind of a component of this name."""
    return next(kind for kind in KINDS.values() if component in kind.names)


def usual_components() -> tuple[str, ...]:
    """The kinds that an export writes by default, where the model has them."""
    return tuple(name for name, kind in KINDS.items() if not (kind.adds or kind.on_request or kind.use == "alone"))


def control_components() -> tuple[str, ...]:
    """The components that add to the UNet: `t2i_adapter`, `controlnet`, `controlnet_1`, ..."""
    return tuple(name for kind in KINDS.values() if kind.adds == "control" for name in kind.names)
