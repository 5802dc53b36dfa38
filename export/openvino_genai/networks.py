"""One network as OpenVINO IR, with the inputs and outputs that OpenVINO GenAI passes and takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file
from accel.errors import MissingPackage


def openvino() -> Any:
    """The library.

    Raises:
        UserError: where it is not installed.
    """
    try:
        import openvino as found
    except ImportError:
        raise MissingPackage("openvino", "a folder for OpenVINO GenAI", "genai") from None
    return found


def converted(bundle: Bundle, record: Component, alphas_cumprod: np.ndarray | None = None) -> Any:
    """The network as an `openvino.Model`: float32 inputs and outputs, whatever it computes in; text ids stay int64.

    Args:
        alphas_cumprod: of the training timesteps, float64 [T], for a UNet that predicts v and shall predict noise.
    """
    model = openvino().Core().read_model(graph_file(bundle, record, "openvino"))
    if record.name == "unet":
        _take_whole_timesteps(model)
    if record.dtype != "float32":
        model = _in_float32(model)
    if record.name == "unet" and alphas_cumprod is not None:
        _predict_noise(model, alphas_cumprod)
    if record.name == "text_encoder_2":
        model = _pooled_first(model)
    return model


def _take_whole_timesteps(model: Any) -> None:
    """`timestep` becomes int64 [1], where an export has a float scalar."""
    from openvino import PartialShape, Type, opset13

    given = _input(model, "timestep")
    kind, readers = given.get_element_type(), given.output(0).get_target_inputs()
    given.set_element_type(Type.i64)
    given.set_partial_shape(PartialShape([1]))
    scalar = opset13.squeeze(opset13.convert(given, kind.get_type_name()), opset13.constant([0]))
    for reader in readers:
        reader.replace_source_output(scalar.output(0))
    model.validate_nodes_and_infer_types()


def _in_float32(model: Any) -> Any:
    """Floating-point inputs and outputs become float32; what lies between stays as it is."""
    from openvino import Type
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    for i, port in enumerate(model.inputs):
        if port.get_element_type().is_real():
            steps.input(i).tensor().set_element_type(Type.f32)
    for i, port in enumerate(model.outputs):
        if port.get_element_type().is_real():
            steps.output(i).tensor().set_element_type(Type.f32)
    return steps.build()


def _predict_noise(model: Any, alphas_cumprod: np.ndarray) -> None:
    """The output v becomes the noise in x: sqrt(a) v + sqrt(1 - a) x (arXiv 2202.00512, appendix D)."""
    from openvino import opset13

    result = model.get_results()[0]
    made, sample, timestep = result.input_value(0), _input(model, "sample"), _input(model, "timestep")

    def at_timestep(table: np.ndarray) -> Any:
        return opset13.gather(opset13.constant(table.astype(np.float32)), timestep, opset13.constant(0))

    scaled = opset13.multiply(at_timestep(np.sqrt(alphas_cumprod)), made)
    noise = opset13.add(scaled, opset13.multiply(at_timestep(np.sqrt(1 - alphas_cumprod)), sample))
    noise.output(0).set_names({*made.get_names()})
    made.set_names(set())
    result.input(0).replace_source_output(noise.output(0))
    model.validate_nodes_and_infer_types()


def _pooled_first(model: Any) -> Any:
    """The projected embedding is the output that GenAI takes as the first."""
    last, pooled, *hidden = model.get_results()
    return openvino().Model([pooled, last, *hidden], model.get_parameters(), model.get_friendly_name())


def _input(model: Any, name: str) -> Any:
    return next(node for node in model.get_parameters() if name in node.output(0).get_names())


def run(model: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a model on the CPU, in float32 where it is not float16 or int8 itself."""
    compiled = openvino().Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.asarray(value) for value in compiled(feeds).values()]


def save(model: Any, folder: Path) -> None:
    """`openvino_model.xml` and `.bin`, weights in the precision that they have."""
    openvino().save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
