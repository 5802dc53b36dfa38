"""Give a UNet's graph one timestep per row of the batch instead of one for all.

A server merges requests of clients that are at different steps. Exported graphs take a scalar timestep, as samplers do,
and first expand it over the batch (Unsqueeze, Expand); here those nodes are removed, and the input is [batch] itself.
"""

from __future__ import annotations

import onnx

_EXPANDING = ("Unsqueeze", "Reshape", "Expand")


def with_row_timesteps(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with `timestep` [batch] instead of []; None where the graph does not first expand a scalar timestep.

    External data (the weights) are not read.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    given = next((value for value in graph.input if value.name == "timestep"), None)
    if given is None or given.type.tensor_type.shape.dim:
        return None
    name = given.name
    spread: list[onnx.NodeProto] = []
    while not spread or spread[-1].op_type != "Expand":
        users = [node for node in graph.node if name in node.input]
        if len(users) != 1 or users[0].op_type not in _EXPANDING or users[0].input[0] != name:
            return None
        spread.append(users[0])
        name = users[0].output[0]
    for node in graph.node:
        for i, used in enumerate(node.input):
            if used == name:
                node.input[i] = given.name
    for node in spread:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    batch = next(v for v in graph.input if v.name == "sample").type.tensor_type.shape.dim[0]
    given.type.tensor_type.shape.dim.add().CopyFrom(batch)
    return changed
