"""ONNX Runtime as a Python-based backend of Triton, in place of the C++ one, which no package registry has.

The server reads the configuration, checks names, shapes and types of requests, joins them and splits the answers; only
the call of the graph is made here.
"""

import json
import os
import sys
from pathlib import Path

sys.path += os.environ["PYTHONPATH"].split(os.pathsep)  # which the server's own Python does not read

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        graph = str(folder / config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]
        self.calls = folder.parent / "calls.txt"

    def execute(self, requests):
        # One call for what the server has joined, as the C++ backend makes it.
        rows = [pb_utils.get_input_tensor_by_name(request, self.inputs[0]).shape()[0] for request in requests]
        with self.calls.open("a") as file:
            file.write(f"{sum(rows)}\n")
        feeds = {
            name: np.concatenate([np.from_dlpack(pb_utils.get_input_tensor_by_name(one, name)) for one in requests])
            for name in self.inputs
        }
        made = self.session.run(self.outputs, feeds)
        parts = [np.split(array, np.cumsum(rows)[:-1]) for array in made]
        return [
            pb_utils.InferenceResponse([tensor(name, parts[k][i]) for k, name in enumerate(self.outputs)])
            for i in range(len(requests))
        ]


def tensor(name, array):
    # By DLPack, as the inputs: the server's binding was compiled for numpy 1, and takes arrays of numpy 2 for empty.
    return pb_utils.Tensor.from_dlpack(name, np.array(array))
