"""The estimate of the memory that a build needs."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import numpy as np
import onnx
import pytest

from accel.bench.memory.graph import peak
from accel.export.tensorrt import audit, child
from accel.export.tensorrt.build import build
from accel.export.tensorrt.compiler import Job
from accel.export.tensorrt.memory import of_graph
from accel.export.tensorrt.options import BuildOptions
from accel.trt import library


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
def test_the_memory_estimate_warns_when_the_gpu_is_full(bundle, tensorrt, monkeypatch):
    from accel.export.tensorrt.build import Cuda

    monkeypatch.setattr(Cuda, "free_bytes", 1000)
    said = []
    build(bundle, ("vae_decoder",), announce=said.append)
    assert "only 0.0 GB are free on the GPU" in said[0]


def test_the_activation_estimate_counts_what_lives_at_once(bundle):
    component = bundle.component("vae_decoder")
    small, sizes = ({name: getattr(limits, end) for name, limits in component.dims.items()} for end in ("min", "max"))
    # Four images of 32 x 32 latents: the scores of the decoder's one attention, before and after softmax.
    scores = 4 * (32 * 32) ** 2 * 4
    assert 2 * scores <= peak(bundle, component, sizes) <= 4 * scores
    # Four times the images and four times the cells; scores grow with the square of the cells.
    assert 16 <= peak(bundle, component, sizes) / peak(bundle, component, small) <= 64


def test_the_activation_estimate_knows_every_shape_of_a_unet(bundle):
    """Eight times the batch and four times the cells: 32 times the activations, and attention grows faster."""
    unet = bundle.component("unet")
    small, large = (
        peak(bundle, unet, {name: getattr(limits, end) for name, limits in unet.dims.items()}) for end in ("min", "max")
    )
    assert 32 * small <= large <= 128 * small


def test_the_estimate_reads_no_weight(bundle, tmp_path):
    """SDXL's weights, turned around and held in the graph, are more than the 2 GB that a graph may have."""
    unet = bundle.component("unet")
    sizes = {name: limits.max for name, limits in unet.dims.items()}
    expected = peak(bundle, unet, sizes)
    graph = tmp_path / "model.onnx"
    shutil.copy(bundle.file(unet.graph), graph)
    assert of_graph(graph, 1000, sizes).activations == expected


def attention(tokens: int = 4096, head: int = 40, kind: int = onnx.TensorProto.FLOAT16) -> onnx.ModelProto:
    """Attention of eight heads as products around a softmax, as an export at opset 20 writes it."""
    make, shape = onnx.helper.make_node, [1, 8, tokens, head]
    q, k, v, y = (onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("q", "k", "v", "y"))
    nodes = [
        make("Mul", ["q", "scale"], ["scaled"], name="scale_q"),
        make("Transpose", ["k"], ["keys"], name="turn", perm=[0, 1, 3, 2]),
        make("MatMul", ["scaled", "keys"], ["scores"], name="product"),
        make("Softmax", ["scores"], ["weights"], name="softmax", axis=-1),
        make("MatMul", ["weights", "v"], ["y"], name="mix"),
    ]
    scale = onnx.numpy_helper.from_array(np.array(head**-0.5, onnx.helper.tensor_dtype_to_np_dtype(kind)), "scale")
    graph = onnx.helper.make_graph(nodes, "attention", [q, k, v], [y], [scale])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.skipif(library.installed("tensorrt-rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize(
    "tokens, head, kind, fused",
    [
        (4096, 40, onnx.TensorProto.FLOAT16, True),
        (1024, 512, onnx.TensorProto.FLOAT16, False),  # the VAE's: there is no kernel for such a head
        (1024, 40, onnx.TensorProto.FLOAT, False),
    ],
)
def test_fused_attention_keeps_no_scores(tmp_path, tokens, head, kind, fused):
    """The estimate, and what the real builder says of its engine: of 4,096 tokens the scores alone are 268 MB."""
    path = tmp_path / "attention.onnx"
    onnx.save(attention(tokens, head, kind), path)
    estimated = of_graph(path, 0, {}).activations
    options = asdict(BuildOptions(timing_cache=False))
    done = child.compile_apart(Job("tensorrt-rtx", "attention", str(path), [], options, ["sm89"]), lambda *_: None)
    assert audit.audit(done.layers)["fused_attentions"] == fused
    scores = 8 * tokens**2 * (2 if kind == onnx.TensorProto.FLOAT16 else 4)
    assert (estimated > scores) == (not fused)
    assert done.activations < scores if fused else 0.3 < estimated / done.activations < 4
