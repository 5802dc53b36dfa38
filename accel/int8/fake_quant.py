"""Fake-quantized layers in torch: they are calibrated and trained. Those that are stored and exported are in `packed`.

They round as `rounding` does, so a packed layer equals a fake-quantized one, and both equal the exported graph up to
the order of float32 sums. Gradients go straight through rounding (Bengio et al. 2013, arXiv 1308.3432); scales learn by
the gradient of LSQ (Esser et al. 2019, arXiv 1902.08153).

`attach` changes a layer in place, by its class: its parameters, hooks and name stay. `detach` undoes it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import products_of, put, take
from .config import TEXT, Int8Config, bos_layer, chosen, is_product
from .formats import INT8, Format, as_traits, for_layer
from .rounding import along, fake_quantize, weight_scale

# What a layer can have beyond plain int8, as the manifest lists it besides its format: an excluded begin-of-text token,
# SmoothQuant, a quantized output.
TRAITS = ("bos", "smooth", "output")


def split_bos(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The begin-of-text tokens of a context [b, tokens, c], and all others."""
    starts = range(0, x.shape[1], TEXT)
    return torch.cat([x[:, at : at + 1] for at in starts], 1), torch.cat([x[:, at + 1 : at + TEXT] for at in starts], 1)


def join_bos(first: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """What `split_bos` took apart."""
    rest = TEXT - 1
    texts = [(first[:, at : at + 1], others[:, at * rest : (at + 1) * rest]) for at in range(first.shape[1])]
    return torch.cat([part for text in texts for part in text], 1)


# ------------------------------------------------------------------------------------------------------- fake-quantized


class Quantizer(nn.Module):
    """The range of one activation tensor.

    Attributes:
        log_scale: natural logarithm of the scale, so that an optimizer's updates are relative to it. A parameter if it
            is learned; otherwise a buffer that follows the largest magnitude during training.
        mode: "quantize"; "disabled", which returns the tensor unchanged; or "observe", which does so too and shows the
            tensor to `observer`.
    """

    def __init__(self, learned: bool = False, momentum: float = 0.01, form: Format = INT8):
        super().__init__()
        self.form = form
        value = torch.zeros(1)  # FSDP takes no scalars
        if learned:
            self.log_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_scale", value)
        self.learned, self.momentum = learned, momentum
        self.mode = "disabled"
        self.observer: Callable[[torch.Tensor], None] | None = None

    @property
    def scale(self) -> torch.Tensor:
        return self.log_scale.float().exp().squeeze(0)

    @torch.no_grad()
    def set_scale(self, scale: float | torch.Tensor) -> None:
        self.log_scale.copy_(torch.as_tensor(scale).log())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.form.activations:
            return x
        if self.mode == "observe":
            self.observer(x.detach())
        if self.mode != "quantize":
            return x
        if not self.learned:
            if self.training:
                self._follow(x)
            return fake_quantize(x, self.scale, self.form)
        # LSQ, section 2.2: the scale's gradient is a sum over all elements, which this brings to a weight's size.
        share = (x.numel() / len(x) * self.form.high) ** -0.5
        scale = self.scale * share + (self.scale * (1 - share)).detach()
        return fake_quantize(x, scale, self.form)

    @torch.no_grad()
    def _follow(self, x: torch.Tensor) -> None:
        peak = x.abs().max().float()
        scale = (peak / self.form.high).log()
        found = torch.where(peak > 0, scale, self.log_scale)  # no branch: a GPU need not be waited for
        self.log_scale.lerp_(found.to(self.log_scale.dtype), self.momentum)


class FakeQuantized:
    """Base of fake-quantized modules: a layer with weights, or a product of two activations.

    Attributes:
        quantizers: the range of each activation that it rounds, by side: input, output, left or right.
        traits: what it has beyond plain int8, out of `TRAITS`.
    """

    quantizers: dict[str, Quantizer]
    traits: list[str]


class FakeQuantLayer(FakeQuantized):
    """A layer with weights. `attach` adds `input_range`, `output_range`, `smooth`, `bos`, `form` and `block`."""

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        found = {"input": self.input_range, "output": self.output_range}
        return {side: quantizer for side, quantizer in found.items() if quantizer is not None}

    @property
    def traits(self) -> list[str]:
        own = (self.bos, self.smooth is not None, self.output_range is not None)
        return as_traits(self.form, self.block) + [trait for trait, is_so in zip(TRAITS, own, strict=True) if is_so]

    @property
    def quantizing(self) -> bool:
        return self.input_range.mode == "quantize"

    def effective_weight(self) -> torch.Tensor:
        """The float weight that is quantized."""
        return self.weight if self.smooth is None else self.weight * self.smooth

    def fake_weight(self) -> torch.Tensor:
        weight = self.effective_weight()
        if not self.quantizing:
            return weight
        return fake_quantize(weight, along(weight_scale(weight, self.form, self.block), weight), self.form)

    def smoothed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.smooth is None else x / self.smooth


class FakeQuantConv2d(FakeQuantLayer, nn.Conv2d):
    """A convolution in int8; its output is rounded too if the config says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._conv_forward(self.input_range(x), self.fake_weight(), self.bias)
        return y if self.output_range is None else self.output_range(y)


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """A linear layer in int8; if it excludes begin-of-text tokens, the first token of each text is not rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, x = self.fake_weight(), self.smoothed(x)
        if not self.bos or self.input_range.mode == "disabled":  # two smaller products may differ in the last bit
            return F.linear(self.input_range(x), weight, self.bias)
        first, others = split_bos(x)
        return join_bos(F.linear(first, weight, self.bias), F.linear(self.input_range(others), weight, self.bias))


class FakeQuantProduct(FakeQuantized, nn.Module):
    """A product of two activations in int8, [..., n, k] times [..., k, m]."""

    def __init__(self, learned: bool = False, form: Format = INT8):
        super().__init__()
        self.traits: list[str] = as_traits(form, 0)
        self.left_range, self.right_range = Quantizer(learned, form=form), Quantizer(learned, form=form)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        return {"left": self.left_range, "right": self.right_range}

    @property
    def active(self) -> bool:
        return self.left_range.mode != "disabled"

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        # Integer products are exact, so autocast must not round them before the softmax.
        with torch.autocast(left.device.type, enabled=False):
            return torch.matmul(self.left_range(left.float()), self.right_range(right.float())).to(left.dtype)


# Layer class -> its fake-quantized class. Training adds peft's layers (`accel.distill.methods.qat`).
FAKE: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: FakeQuantConv2d, nn.Linear: FakeQuantLinear}
_PLAIN = "_plain_class"


def layers_of(model: nn.Module) -> dict[str, bool]:
    """{name: whether it is a convolution} of all layers that can be quantized; products of self-attention come last. A
    module inside such a layer counts as part of it."""
    found: dict[str, bool] = {}
    within = ""
    for name, module in model.named_modules():
        if within and name.startswith(within):
            continue
        if type(module) in FAKE:
            found[name] = issubclass(FAKE[type(module)], FakeQuantConv2d)
            within = f"{name}."
    return found | dict.fromkeys(products_of(model), False)


def attach(
    model: nn.Module, config: Int8Config, *, names: Sequence[str] | None = None, learned: bool = False
) -> list[str]:
    """Make the layers that a config names fake-quantized, in place. They are disabled until `set_mode`.

    Args:
        names: these layers instead of the config's.
        learned: make the ranges parameters.

    Returns:
        Names of the layers.

    Raises:
        UserError: when the config quantizes no layer.
    """
    names = list(names) if names is not None else chosen(config, layers_of(model))
    wanted = config.number_format
    for name in names:
        if is_product(name):
            product = FakeQuantProduct(learned, wanted).train(model.training)
            put(model, name, product.to(next(model.parameters()).device))
            continue
        module = model.get_submodule(name)
        plain = type(module)
        convolution = issubclass(FAKE[plain], FakeQuantConv2d)
        device = next(module.parameters()).device
        module.form, module.block = for_layer(wanted, config.block, module.weight.shape)
        module.input_range = Quantizer(learned, form=wanted).to(device)
        outputs = convolution and config.outputs and wanted is INT8
        module.output_range = Quantizer(learned).to(device) if outputs else None
        module.register_buffer("smooth", None)
        module.bos = config.exclude_bos and wanted.activations and wanted.evenly and bos_layer(name)
        module.__class__ = FAKE[plain]
        setattr(module, _PLAIN, plain)
        module.train(module.training)
    return names


def detach(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
    """Undo `attach` for the named layers (for all, without names): they are exactly what they were.

    Returns:
        The scales of the whole model as they were (`scales`).
    """
    found = scales(model)
    for name, module in fake_layers(model):
        if names is not None and name not in names:
            continue
        if isinstance(module, FakeQuantProduct):
            take(model, name)
            continue
        plain = getattr(module, _PLAIN)
        for own in ("input_range", "output_range", "smooth", "bos", "form", "block", _PLAIN):
            delattr(module, own)
        module.__class__ = plain
    return found


def fake_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in list(model.named_modules()) if isinstance(module, FakeQuantized))


def ranges(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every range of a model by name: LAYER.input and LAYER.output, or PRODUCT.left and PRODUCT.right.

    A layer of which only weights are quantized has none.
    """
    for name, layer in fake_layers(model):
        found = layer.quantizers.items()
        yield from ((f"{name}.{side}", quantizer) for side, quantizer in found if quantizer.form.activations)


def set_mode(model: nn.Module, mode: str, names: Sequence[str] | None = None) -> None:
    """Set the mode (`Quantizer`) of the named layers (of all, without names)."""
    wanted = None if names is None else set(names)
    for name, layer in fake_layers(model):
        if wanted is None or name in wanted:
            for quantizer in layer.quantizers.values():
                quantizer.mode = mode


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """The calibrated or learned scales, on the CPU, as `set_scales` takes them."""
    found = {f"{name}_scale": quantizer.scale.detach().cpu() for name, quantizer in ranges(model)}
    smooth = {f"{name}.smooth": layer.smooth for name, layer in fake_layers(model) if "smooth" in layer.traits}
    return found | {name: value.detach().cpu() for name, value in smooth.items()}


def set_scales(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Restore what `scales` returned. Raises KeyError for a range that has none."""
    for name, quantizer in ranges(model):
        quantizer.set_scale(values[f"{name}_scale"])
    for name, layer in fake_layers(model):
        if f"{name}.smooth" in values:
            layer.smooth = values[f"{name}.smooth"].to(layer.input_range.log_scale.device)


def traits(model: nn.Module) -> dict[str, list[str]]:
    """{name: traits} of the fake-quantized layers of a model."""
    return {name: layer.traits for name, layer in fake_layers(model)}
