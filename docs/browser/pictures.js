// The loop around the graphs: what `generate`, `refine` and their samplers do, in the order of OnnxPictures.

const GREEDY_TEMPERATURE = 1e-6; // the lowest that the pipelines take

export class PromptError extends Error {
  constructor(reason, details = {}) {
    super(reason);
    this.reason = reason;
    this.details = details;
  }
}

export class Pictures {
  // `run(name, feeds)` runs a graph: feeds and results are { type, data, dims } by name.
  constructor(description, tokenizer, run) {
    this.known = description;
    this.tokenizer = tokenizer;
    this.run = run;
  }

  // Ids of a prompt with the suffix of its style.
  encode(prompt, style) {
    if (!prompt.trim() || !this.tokenizer.encode(prompt).length) throw new PromptError("empty");
    const text = this.tokenizer.knownText(prompt) + style.suffix[this.tokenizer.language(prompt)];
    const ids = this.tokenizer.encodeBeforeImage(text);
    const most = this.known.text.max_text_tokens;
    if (ids.length > most) throw new PromptError("long", { tokens: ids.length, most });
    return ids;
  }

  // `onStep(done, total, tokens, grid)` hears of each token and pass; -1 is what is not known yet.
  async draw({ prompt, style: name, seed = 0, greedy = false, onStep = () => {} }) {
    const style = name == null ? (this.known.plain ?? this.known.styles[this.known.default_style]) : this.known.styles[name];
    const text = this.encode(prompt, style);
    const noise = new Noise(seed);
    const steps = style.stages.map((stage) => stage.top_k.length);
    const [rows, columns] = this.known.text.image_grid;
    const total = steps.reduce((sum, count) => sum + count, rows * columns);
    let tokens = await this.#write(text, style, noise, greedy, (done, now) => onStep(done, total, now, [rows, columns]));
    const after = { transformer: tokens };
    let grid = [rows, columns];
    let done = rows * columns;
    for (const stage of style.stages) {
      grid = this.known.canvases[stage.name].fine_grid;
      tokens = await this.#refine(stage, text, tokens, noise, greedy, (step, now) => onStep(done + step, total, now, grid));
      done += stage.top_k.length;
      after[stage.name] = tokens;
    }
    return { tokens: after, ...(await this.decode(tokens, grid)) };
  }

  // RGBA bytes of tokens.
  async decode(tokens, [rows, columns]) {
    const { pixels } = await this.run("vqvae", { tokens: whole(tokens, [1, rows, columns]) });
    const [, , height, width] = pixels.dims;
    const rgba = new Uint8ClampedArray(4 * height * width).fill(255);
    for (let channel = 0; channel < 3; channel++)
      for (let place = 0; place < height * width; place++)
        rgba[4 * place + channel] = pixels.data[channel * height * width + place] * 255; // rounds half to even
    return { rgba, height, width };
  }

  async #write(text, style, noise, greedy, onStep) {
    const known = this.known.text;
    const scale = style.guidance_scale;
    const texts = scale === 1 ? [text] : [text, []];
    const length = known.image_grid[0] * known.image_grid[1];
    const numbers = noise.draw(length);
    let { ids, positions, bias, keyBias, width } = textToImage(texts, known, style.text_attention_bias);
    let past = Array(known.num_layers).fill(
      float(new Float32Array(0), [2, texts.length, known.num_heads, 0, known.head_dim]),
    );
    let fresh = width;
    const tokens = Array(length).fill(-1);
    for (let index = 0; index < length; index++) {
      const feeds = {
        input_ids: whole(ids, [texts.length, fresh]),
        position_ids: whole(positions, [texts.length, fresh]),
        bias: float(bias, [texts.length, fresh, bias.length / texts.length / fresh]),
      };
      past.forEach((values, layer) => (feeds[`past.${layer}`] = values));
      const results = await this.run("transformer", feeds);
      past = past.map((_, layer) => results[`present.${layer}`]);
      let logits = results.logits.data;
      if (texts.length === 2) {
        const half = logits.length / 2;
        const unwanted = logits.subarray(half);
        logits = logits.subarray(0, half).map((wanted, token) => unwanted[token] + Math.fround(scale * Math.fround(wanted - unwanted[token])));
      }
      tokens[index] = this.#draw(logits, style, style.top_k_clusters, numbers[index], greedy);
      onStep(index + 1, tokens);
      fresh = 1;
      ids = texts.map(() => tokens[index]);
      positions = texts.map(() => known.image_position + 1 + index);
      const keys = width + index + 1;
      bias = new Float32Array(texts.length * keys);
      texts.forEach((_, row) => bias.set(keyBias.subarray(row * width, (row + 1) * width), row * keys));
    }
    return tokens;
  }

  async #refine(stage, text, low, noise, greedy, onStep) {
    const known = this.known.text;
    const { fine_grid: [rows, columns], super_resolution, num_text_slots } = this.known.canvases[stage.name];
    const direct = super_resolution === "direct";
    const numbers = noise.draw(rows * columns);
    const context = direct
      ? directContext(text, low, num_text_slots, known)
      : iterativeContext(text, num_text_slots);
    const canvas = direct ? Array(rows * columns).fill(known.boi_token_id) : [...low];
    const grid = stage.step_grid;
    const stepOf = (cell) => {
      const row = Math.floor(cell / columns);
      return grid[row % grid.length][(cell % columns) % grid[0].length];
    };
    for (let step = 1; step <= stage.top_k.length; step++) {
      const all = [...canvas.keys()];
      const cells = all.filter((cell) => stepOf(cell) === step);
      const visible = canvas.map((token, cell) => (stepOf(cell) >= step ? known.boi_token_id : token));
      const { logits } = await this.run(stage.name, {
        ...context,
        canvas_ids: whole(visible, [1, canvas.length]),
        cells: whole(cells, [cells.length]),
      });
      const width = logits.dims[2];
      cells.forEach((cell, index) => {
        const own = logits.data.subarray(index * width, (index + 1) * width);
        canvas[cell] = this.#draw(own, stage, stage.top_k[step - 1], numbers[cell], greedy);
      });
      onStep(step, canvas);
    }
    return canvas;
  }

  #draw(logits, settings, topK, noise, greedy) {
    if (!logits.every(Number.isFinite)) throw new Error("The model's scores are not finite.");
    const temperature = greedy ? GREEDY_TEMPERATURE : settings.temperature;
    if (settings.cluster_temperature === null) return sampleToken(logits, noise, temperature, topK);
    const { cluster_labels, num_clusters } = this.known;
    const within = greedy ? 1 : settings.cluster_temperature;
    return sampleClusterToken(logits, noise, cluster_labels, num_clusters, temperature, topK, within);
  }
}

const whole = (values, dims) => ({ type: "int64", data: BigInt64Array.from(values, BigInt), dims });
const float = (data, dims) => ({ type: "float32", data, dims });

// Sequences: as models/cogview2/sequences.py

function padded(text, slots) {
  const padding = slots - text.length;
  return {
    ids: [...Array(padding).fill(0), ...text],
    positions: [...Array(padding).fill(0), ...text.keys()],
    padding,
  };
}

// `[padding] text <start_of_image>` of each text: text sees text, the start sees text and itself, padding itself.
export function textToImage(texts, known, textBias) {
  const slots = Math.max(...texts.map((text) => text.length));
  const width = slots + 1;
  const ids = [];
  const positions = [];
  const bias = new Float32Array(texts.length * width * width);
  const keyBias = new Float32Array(texts.length * width);
  texts.forEach((text, index) => {
    const own = padded(text, slots);
    ids.push(...own.ids, known.boi_token_id);
    positions.push(...own.positions, known.image_position);
    const isText = (place) => place >= own.padding && place < slots;
    for (let row = 0; row < width; row++)
      for (let column = 0; column < width; column++) {
        const seen = row < own.padding ? row === column : isText(column) || (row === slots && column === slots);
        bias[(index * width + row) * width + column] = seen ? (isText(column) ? textBias : 0) : known.masked_score;
      }
    for (let column = 0; column < width; column++)
      keyBias[index * width + column] = column < own.padding ? known.masked_score : isText(column) ? textBias : 0;
  });
  return { ids, positions, bias, keyBias, width };
}

function context(ids, positions, sees) {
  const length = ids.length;
  const mask = new Uint8Array(length * length);
  for (let row = 0; row < length; row++)
    for (let column = 0; column < length; column++) mask[row * length + column] = sees(row, column) ? 1 : 0;
  return {
    context_ids: whole(ids, [1, length]),
    context_positions: whole(positions, [1, length]),
    context_mask: { type: "bool", data: mask, dims: [1, length, length] },
  };
}

function directContext(text, low, slots, known) {
  const { ids, positions, padding } = padded(text.slice(0, slots - 1), slots);
  const kind = (place) => (place < padding ? "padding" : place < slots ? "text" : "image");
  return context(
    [...ids, ...low],
    [...positions, ...low.map((_, index) => known.image_position + 1 + index)],
    (row, column) => kind(column) === "text" || (kind(row) !== "text" && kind(row) === kind(column)),
  );
}

function iterativeContext(text, slots) {
  const { ids, positions, padding } = padded(text.slice(0, slots), slots);
  return context(ids, positions, (row, column) => column >= padding);
}

// Sampling: as generation/sampling.py

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = Float32Array.from(logits, (value) => Math.exp(value - most));
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / total);
}

function drawIndex(probabilities, noise) {
  const sums = new Float32Array(probabilities.length);
  let sum = 0;
  probabilities.forEach((value, index) => (sums[index] = sum += value));
  const total = sums.at(-1);
  const drawn = sums.findIndex((value) => value > Math.fround(noise * total));
  if (drawn >= 0 && probabilities[drawn] > 0) return drawn;
  return probabilities.indexOf(probabilities.reduce((a, b) => Math.max(a, b)));
}

export function sampleToken(logits, noise, temperature, topK) {
  const scaled = Float32Array.from(logits, (value) => value / temperature);
  const least = scaled.slice().sort((a, b) => b - a)[Math.min(topK, scaled.length) - 1];
  return drawIndex(softmax(scaled.map((value) => (value < least ? -Infinity : value))), noise[1]);
}

export function sampleClusterToken(logits, noise, labels, count, temperature, topK, within) {
  const scaled = Float32Array.from(logits, (value) => value / temperature);
  const masses = new Float32Array(count);
  softmax(scaled).forEach((value, token) => (masses[labels[token]] += value));
  const heaviest = [...masses.keys()].sort((a, b) => masses[b] - masses[a]).slice(0, topK);
  const kept = heaviest.sort((a, b) => a - b);
  const cluster = kept[drawIndex(Float32Array.from(kept, (one) => masses[one]), noise[0])];
  const inside = scaled.map((value, token) => (labels[token] === cluster ? value / within : -Infinity));
  return drawIndex(softmax(inside), noise[1]);
}

// The numbers that a CPU generator of PyTorch draws: 24 bits of each of those of a Mersenne Twister.
export class Noise {
  constructor(seed) {
    this.state = new Uint32Array(624);
    this.state[0] = seed % 2 ** 32;
    for (let index = 1; index < 624; index++) {
      const last = this.state[index - 1] ^ (this.state[index - 1] >>> 30);
      this.state[index] = Math.imul(last, 1812433253) + index;
    }
    this.place = 624;
  }

  #next() {
    const { state } = this;
    if (this.place === 624) {
      for (let index = 0; index < 624; index++) {
        const bits = (state[index] & 0x80000000) | (state[(index + 1) % 624] & 0x7fffffff);
        state[index] = state[(index + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
      }
      this.place = 0;
    }
    let bits = state[this.place++];
    bits ^= bits >>> 11;
    bits ^= (bits << 7) & 0x9d2c5680;
    bits ^= (bits << 15) & 0xefc60000;
    return (bits ^ (bits >>> 18)) >>> 0;
  }

  // Pairs in [0, 1).
  draw(count) {
    return Array.from({ length: count }, () => [0, 0].map(() => (this.#next() & 0xffffff) * 2 ** -24));
  }
}
