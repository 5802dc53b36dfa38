import { SingleGraph } from "./single_graph.js";

const at = (id) => document.getElementById(id);
// WebGPU needs another, larger build of the runtime, so it is fetched only where it is asked for.
const RUNTIMES = { wasm: "./ort/ort.wasm.bundle.min.mjs", webgpu: "./ort/ort.webgpu.bundle.min.mjs" };
let graph;

async function load() {
  at("draw").disabled = true;
  at("problem").textContent = "";
  try {
    const started = performance.now();
    const engine = at("engine").value;
    const ort = await import(RUNTIMES[engine]);
    ort.env.wasm.wasmPaths = new URL("./ort/", location.href).href;
    graph = await SingleGraph.load(ort, ".", engine);
    at("loading").textContent = `${Math.round(performance.now() - started)} ms`;
    const { source, precision, timesteps } = graph.record;
    at("model").textContent = `${source.name}, ${precision}, ${timesteps.length} step${timesteps.length > 1 ? "s" : ""}, ${(graph.bytes / 1e6).toFixed(1)} MB`;
    at("draw").disabled = false;
  } catch (error) {
    at("problem").textContent = error.message;
  }
}

async function draw() {
  at("draw").disabled = true;
  at("problem").textContent = "";
  try {
    const prompt = at("prompt").value;
    const started = performance.now();
    const { data, width, height } = await graph.draw(prompt, Number(at("seed").value));
    const milliseconds = performance.now() - started;
    const pixels = new ImageData(width, height);
    for (let i = 0; i < width * height; ++i) {
      pixels.data.set(data.subarray(3 * i, 3 * i + 3), 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    remember();
    Object.assign(at("image"), { width, height });
    at("image").getContext("2d").putImageData(pixels, 0, 0);
    at("image").dataset.prompt = prompt;
    at("milliseconds").textContent = `${milliseconds.toFixed(0)} ms`;
  } catch (error) {
    at("problem").textContent = error.message;
  }
  at("draw").disabled = false;
}

// The image before this one joins the small ones below.
function remember() {
  const { prompt } = at("image").dataset;
  if (prompt === undefined) return;
  const figure = document.createElement("figure");
  const copy = document.createElement("canvas");
  Object.assign(copy, { width: at("image").width, height: at("image").height });
  copy.getContext("2d").drawImage(at("image"), 0, 0);
  const caption = document.createElement("figcaption");
  caption.textContent = prompt;
  figure.append(copy, caption);
  at("earlier").prepend(figure);
  while (at("earlier").childElementCount > 16) at("earlier").lastChild.remove();
}

document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
at("engine").addEventListener("change", load);
if (await navigator.gpu?.requestAdapter()) at("engine").append(new Option("WebGPU", "webgpu"));
await load();
