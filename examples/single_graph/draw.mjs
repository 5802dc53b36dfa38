// A prompt to an image with one ONNX file: `node draw.mjs GRAPH_FOLDER "a handwritten seven" seven.ppm [SEED]`.
// Needs `npm install` in this folder: onnxruntime-node.
import { readFileSync, writeFileSync } from "node:fs";
import { InferenceSession, Tensor } from "onnxruntime-node";
import { Tokenizer } from "../browser/tokenizer.js";

const [folder, prompt, out, seed = "7"] = process.argv.slice(2);
const json = (name) => JSON.parse(readFileSync(`${folder}/${name}`, "utf8"));
const tokenizer = new Tokenizer(json("tokenizer/tokenizer.json"));
const ids = (text) => new Tensor("int64", BigInt64Array.from(tokenizer.encode(text), BigInt), [1, 77]);
const { inputs, graphs, profile } = json("single_graph.json"); // of two graphs the last one is for ONNX Runtime
const session = await InferenceSession.create(`${folder}/${graphs.at(-1)}`);
const number = (name) => new Tensor("int32", Int32Array.of(name === "seed" ? seed : profile[name].opt), [1]); // height, width
const feeds = {};
for (const { name, dtype } of inputs) feeds[name] = dtype === "int32" ? number(name) : ids(name.startsWith("negative") ? "" : prompt);
const { image } = await session.run(feeds);
writeFileSync(out, Buffer.concat([Buffer.from(`P6\n${image.dims[2]} ${image.dims[1]}\n255\n`), image.data]));
