"""CLIP's tokenizer of ONNX Runtime Extensions in the graph, so that text is the input.

Text is changed before it, and ids after it, so that they are CLIP's: white space is joined, digits stand alone, and the
last id of a long prompt is the end. Special tokens in a prompt are dropped, because it ends the process on them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from accel.bundle import Bundle
from accel.errors import MissingPackage, UserError
from accel.text.tokenizer import ClipTokenizer

from .nodes import Nodes, int64

DOMAIN = "ai.onnx.contrib"
_CLEAN = ((r"<\|(start|end)oftext\|>", " "), (r"([0-9])", r"\1 "), (r"\s+", " "), ("^ | $", ""))


def add(model: onnx.ModelProto, bundle: Bundle, tokenizers: Mapping[str, ClipTokenizer]) -> None:
    """Replace the inputs of token ids by `prompt`, and `negative_prompt` where there is one: strings [images].

    Args:
        tokenizers: of each text encoder.

    Raises:
        UserError: for a tokenizer whose ids the node does not give; MissingPackage without ONNX Runtime Extensions.
    """
    nodes = Nodes("tokenizer")
    graph, rows = model.graph, model.graph.input[0].type.tensor_type.shape.dim[0]
    kept = [value for value in graph.input if "input_ids" not in value.name]
    texts: dict[str, str] = {}
    for value in graph.input:
        if "input_ids" not in value.name:
            continue
        name = "negative_prompt" if value.name.startswith("negative_") else "prompt"
        encoder = value.name.removeprefix("negative_").replace("input_ids", "text_encoder")
        if name not in texts:
            given = helper.make_tensor_value_info(name, TensorProto.STRING, [rows.dim_param or rows.dim_value])
            kept.append(given)
            texts[name] = _clean(nodes, name)
        _encode(nodes, bundle, encoder, tokenizers[encoder], texts[name], value.name)
    del graph.input[:]
    graph.input.extend(kept)
    old = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes.nodes, *old])
    graph.initializer.extend(nodes.constants.values())
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def library() -> str:
    """The path of ONNX Runtime Extensions' library, for `SessionOptions.register_custom_ops_library`."""
    try:
        from onnxruntime_extensions import get_library_path
    except ImportError:
        raise MissingPackage("onnxruntime-extensions", "text as the input of a graph", "text") from None
    return get_library_path()


def _clean(nodes: Nodes, name: str) -> str:
    for pattern, to in _CLEAN:
        name = nodes.op(
            "StringRegexReplace", name, nodes.text(pattern), nodes.text(to), domain=DOMAIN, global_replace=1
        )
    return name


def _encode(nodes: Nodes, bundle: Bundle, encoder: str, tokenizer: ClipTokenizer, text: str, name: str) -> None:
    folder = encoder.replace("text_encoder", "tokenizer")
    if tokenizer.pad != tokenizer.eos:
        raise UserError(
            f"{folder} pads with another token than its end, which the node cannot", "leave --text-input out"
        )
    kinds = {"vocab": "vocab.json", "merges": "merges.txt"}
    files = {kind: bundle.file(f"{folder}/{file}").read_text("utf-8") for kind, file in kinds.items()}
    outputs, length = [f"{name}_{part}" for part in ("uncut", "mask", "offsets")], tokenizer.length
    # Padded to the longest prompt of the batch: with a length given, a longer one shifts the rows behind it.
    options = dict(files, padding_length=-1, domain=DOMAIN, name=f"{name}_tokenizer")
    nodes.nodes.append(helper.make_node("CLIPTokenizer", [text], outputs, **options))
    long = nodes.op("Pad", outputs[0], int64([0, 0, 0, length]), int64(tokenizer.eos))
    cut = nodes.op("Slice", long, int64([0]), int64([length - 1]), int64([1]))
    nodes.op("Pad", cut, int64([0, 0, 0, 1]), int64(tokenizer.eos), name=name)
