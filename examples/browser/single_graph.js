// A single graph of accel in JavaScript: `accel export MODEL model --target single-graph`, its folder served beside.
// `ort` is onnxruntime-web or onnxruntime-node.
import { Tokenizer } from "./tokenizer.js";

const json = async (url) => {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer.json();
};

export class SingleGraph {
  // folder: address of the export; engine: "wasm" or "webgpu".
  static async load(ort, folder, engine = "wasm") {
    const [record, tokenizer] = await Promise.all([json(`${folder}/single_graph.json`), json(`${folder}/tokenizer/tokenizer.json`)]);
    const graph = record.graphs.at(-1); // an int8 export has one for ONNX Runtime behind the one for all engines
    const session = await ort.InferenceSession.create(`${folder}/${graph}`, {
      executionProviders: engine === "wasm" ? ["wasm"] : [engine, "wasm"],
      externalData: [{ path: "weights.safetensors", data: `${folder}/weights.safetensors` }],
    });
    return new SingleGraph(ort, record, new Tokenizer(tokenizer), session, graph);
  }

  constructor(ort, record, tokenizer, session, graph) {
    Object.assign(this, { ort, record, tokenizer, session, graph });
  }

  get bytes() {
    return this.record.files[this.graph].bytes + this.record.files["weights.safetensors"].bytes;
  }

  // {data: Uint8Array of RGB, width, height} of a prompt and a seed. A graph that takes a size draws the usual one, or
  // what is given within `record.profile`.
  async draw(prompt, seed, size = {}) {
    const ids = (text) => new this.ort.Tensor("int64", BigInt64Array.from(this.tokenizer.encode(text), BigInt), [1, 77]);
    const number = (name) => (name === "seed" ? seed : (size[name] ?? this.record.profile[name].opt));
    const feeds = {};
    for (const { name, dtype } of this.record.inputs)
      feeds[name] = dtype === "int32" ? new this.ort.Tensor(dtype, Int32Array.of(number(name)), [1]) : ids(name.startsWith("negative") ? "" : prompt);
    const { image } = await this.session.run(feeds);
    const [, height, width] = image.dims;
    return { data: image.data, width, height };
  }
}
