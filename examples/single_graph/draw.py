"""A prompt to an image with one ONNX file: `python draw.py GRAPH_FOLDER "a handwritten seven" seven.png [SEED]`.

GRAPH_FOLDER is what `accel export MODEL GRAPH_FOLDER --target single-graph` wrote. Needs numpy, onnxruntime, pillow and
tokenizers; neither accel nor torch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

folder, prompt, out, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int((*sys.argv[4:], 7)[0])
record = json.loads((folder / "single_graph.json").read_text())
tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
tokenizer.enable_padding(length=77, pad_id=tokenizer.token_to_id("<|endoftext|>"))
tokenizer.enable_truncation(77)
ids = {text: np.array([tokenizer.encode(text).ids]) for text in ("", prompt)}
session = onnxruntime.InferenceSession(folder / record["graphs"][-1])  # of two the last one is for ONNX Runtime
texts = {i["name"]: ids["" if "negative" in i["name"] else prompt] for i in record["inputs"] if "ids" in i["name"]}
numbers = {"seed": seed} | {side: limits["opt"] for side, limits in record["profile"].items()}  # height and width
taken = {i["name"]: np.array([numbers[i["name"]]], np.int32) for i in record["inputs"] if i["name"] in numbers}
(images,) = session.run(["image"], texts | taken)
Image.fromarray(images[0]).save(out)
