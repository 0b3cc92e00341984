// Loads the model and draws, so that the page stays alive.

import * as ort from "./ort.wasm.bundle.min.mjs";
import { Pictures, PromptError } from "./pictures.js";
import { Tokenizer } from "./tokenizer.js";

let pictures;

async function fetchBytes(url, onBytes = () => {}) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status}`);
  const parts = [];
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    onBytes(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const fetchJson = async (url) => JSON.parse(new TextDecoder().decode(await fetchBytes(url)));

async function load(model) {
  const description = await fetchJson(`${model}/model.json`);
  if (description.format !== "cogview2-onnx" || description.format_version !== 1)
    throw new Error(`model.json: ${description.format} ${description.format_version}`);
  const total = Object.values(description.files).reduce((sum, file) => sum + file.bytes, 0);
  let loaded = 0;
  const onBytes = (count) => postMessage({ kind: "loading", loaded: (loaded += count), total });
  const runtime = await fetchBytes("ort-wasm-simd-threaded.wasm.gz");
  const isCompressed = runtime[0] === 0x1f && runtime[1] === 0x8b; // some servers have it unpacked on the way
  const stream = new Blob([runtime]).stream();
  const unpacked = isCompressed ? stream.pipeThrough(new DecompressionStream("gzip")) : stream;
  ort.env.wasm.wasmBinary = await new Response(unpacked).arrayBuffer();
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  const files = {};
  for (const [name, { bytes }] of Object.entries(description.files)) {
    files[name] = await fetchBytes(`${model}/${name}`, onBytes);
    if (files[name].length !== bytes) throw new Error(`${name}: ${files[name].length} bytes, not ${bytes}`);
  }
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(files["tokenizer.json"])));
  const sessions = {};
  for (const [name, { graph, weights }] of Object.entries(description.graphs)) {
    const externalData = weights.map((path) => ({ path, data: files[path] }));
    sessions[name] = await ort.InferenceSession.create(files[graph], { externalData, executionProviders: ["wasm"] });
  }
  const run = async (name, feeds) => {
    const session = sessions[name];
    const named = session.inputNames.map((input) => [input, feeds[input]]);
    const tensors = named.map(([input, value]) => [
      input,
      value instanceof ort.Tensor ? value : new ort.Tensor(value.type, value.data, value.dims),
    ]);
    return session.run(Object.fromEntries(tensors));
  };
  pictures = new Pictures(description, tokenizer, run);
  const styles = Object.keys(description.styles);
  postMessage({ kind: "ready", styles, defaultStyle: description.default_style });
}

async function draw(order) {
  const parts = pictures.tokenizer.unknownParts(order.prompt);
  if (parts.length) postMessage({ kind: "unknown", parts, hasRest: pictures.tokenizer.knowsSome(order.prompt) });
  const picture = await pictures.draw({
    ...order,
    onStep: (done, total) => postMessage({ kind: "step", done, total }),
  });
  postMessage({ kind: "picture", ...picture });
}

onmessage = async ({ data }) => {
  try {
    await (data.kind === "load" ? load(data.model) : draw(data.order));
  } catch (error) {
    if (error instanceof PromptError) postMessage({ kind: "refused", reason: error.reason, details: error.details });
    else postMessage({ kind: "failed", during: data.kind, message: String(error?.message ?? error) });
  }
};
