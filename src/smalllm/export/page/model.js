// A GPT's forward pass, one token at a time: what is hot is in decoder.wat, the walk through the layers is here.

const GROUP = 64, LANES = 16, F32 = 4;
const GROUP_BYTES = GROUP * LANES + LANES * F32; // of a panel of a matrix: weights, then scales
const up = (number, multiple) => Math.ceil(number / multiple) * multiple;

class Model {
  #c; // the settings of the model
  #hot; // the functions of decoder.wat
  #memory;
  #end = 1024; // of what is taken of the memory; 0 stands for "none"
  #at = {}; // name -> place of a tensor or of a buffer
  #sizes = {}; // name of a matrix -> its bytes

  /** `about` tells the settings, the tensors and where they lie in the bytes (export/html.py writes both). */
  static async load(about, bytes) {
    const model = new Model();
    await model.#build(about, bytes);
    return model;
  }

  async #build({ config, tensors, decoder }, bytes) {
    const c = (this.#c = config), begin = this.#end;
    const cacheRow = c.layers * c.kv_heads * up(c.head_width, LANES);
    const size = begin + bytes.length + 2 * cacheRow * up(c.context, LANES) * F32 + this.#buffers(0);
    this.#memory = new WebAssembly.Memory({ initial: Math.ceil(size / 65536) + 1 });
    new Uint8Array(this.#memory.buffer).set(bytes, begin);
    for (const [name, { offset, size }] of Object.entries(tensors)) {
      this.#at[name] = begin + offset;
      this.#sizes[name.replace(/\.weight$/, "")] = size;
    }
    this.#end = up(begin + bytes.length, 64);
    this.#buffers(this.#end);
    const code = bytes.subarray(decoder.offset, decoder.offset + decoder.size);
    if (!WebAssembly.validate(code)) throw new Error("this browser has no WebAssembly SIMD, which browsers have since 2023");
    const { instance } = await WebAssembly.instantiate(code, { page: { memory: this.#memory } });
    this.#hot = instance.exports;
    this.vocab = c.vocab_size;
    this.context = c.context;
    this.#tables();
  }

  /** Lay out what a step needs from a place on; the size of it. Ends of buffers stay zero: matrices, biases and norms end in zeros. */
  #buffers(begin) {
    const c = this.#c, width = up(c.width, GROUP), qkv = (c.heads + 2 * c.kv_heads) * c.head_width;
    const half = c.positions === "rope" ? (c.context * c.head_width) / 2 : 0;
    const cache = c.layers * c.kv_heads * up(c.context, LANES) * up(c.head_width, LANES);
    const hidden = up(c.hidden_width, GROUP), most = Math.max(width, hidden, up(c.heads * c.head_width, GROUP));
    const numbers = {
      x: width, normed: width, mixed: up(c.heads * c.head_width, GROUP) + GROUP, hidden,
      y: Math.max(qkv, (c.gated ? 2 : 1) * c.hidden_width) + GROUP, head: up(c.head_width, LANES), query: up(c.head_width, LANES),
      scores: up(c.context, LANES), whole: most, scales: most / GROUP, logits: up(c.vocab_size, LANES),
      cos: half, sin: half, keys: cache, values: cache,
    };
    let end = begin;
    for (const [name, count] of Object.entries(numbers)) {
      this.#at[name] = end;
      end = up(end + count * F32, 64);
    }
    return end - begin;
  }

  #floats(place, count) {
    return new Float32Array(this.#memory.buffer, place, count);
  }

  /** RoPE's cosines and sines of position x frequency. */
  #tables() {
    const { positions, context, head_width: width, theta } = this.#c;
    if (positions !== "rope") return;
    const half = width / 2, cos = this.#floats(this.#at.cos, context * half), sin = this.#floats(this.#at.sin, context * half);
    for (let d = 0; d < half; d++) {
      const frequency = theta ** ((-2 * d) / width);
      for (let position = 0; position < context; position++) {
        cos[position * half + d] = Math.cos(position * frequency);
        sin[position * half + d] = Math.sin(position * frequency);
      }
    }
  }

  /** Read a token at a position behind those that were read; the logits of the next one (to be used at once) if wanted. */
  step(id, position, wanted) {
    const c = this.#c, at = this.#at;
    this.#embed(id, position);
    for (let layer = 0; layer < c.layers; layer++) {
      const block = `blocks.${layer}.`;
      this.#norm(at.x, at.normed, `${block}attention_norm`, c.width);
      this.#product(at.normed, c.width, `${block}attention.qkv`, at.y, false);
      this.#attention(layer, position, block);
      this.#product(at.mixed, c.heads * c.head_width, `${block}attention.out`, at.x, true);
      this.#norm(at.x, at.normed, `${block}mlp_norm`, c.width);
      this.#product(at.normed, c.width, `${block}mlp.up`, at.y, false);
      if (c.gated) this.#hot.silu(at.y, at.y + c.hidden_width * F32, at.hidden, c.hidden_width);
      else this.#hot.gelu(at.y, at.hidden, c.hidden_width);
      this.#product(at.hidden, c.hidden_width, `${block}mlp.down`, at.x, true);
    }
    if (!wanted) return null;
    this.#norm(at.x, at.normed, "norm", c.width);
    this.#product(at.normed, c.width, c.tied ? "embedding" : "head", at.logits, false);
    return this.#floats(at.logits, c.vocab_size);
  }

  #embed(id, position) {
    const { width, positions } = this.#c, x = this.#floats(this.#at.x, width);
    const memory = this.#memory.buffer, bytes = Math.ceil(width / GROUP) * GROUP_BYTES, row = id % LANES;
    const panel = this.#at["embedding.weight"] + ((id - row) / LANES) * bytes;
    for (let c = 0; c < width; c += GROUP) { // out of the same panels of which the head is made
      const group = panel + (c / GROUP) * GROUP_BYTES, [scale] = new Float32Array(memory, group + GROUP * LANES + row * F32, 1);
      const numbers = new Int8Array(memory, group, GROUP * LANES), first = (row >> 2) * 16 + (row & 3) * 2;
      for (let i = 0; i < GROUP && c + i < width; i++) x[c + i] = numbers[first + (i >> 2) * 64 + ((i >> 1) & 1) * 8 + (i & 1)] * scale;
    }
    if (positions !== "learned") return;
    const where = this.#floats(this.#at["position_embedding.weight"] + position * width * F32, width);
    for (let c = 0; c < width; c++) x[c] += where[c];
  }

  #norm(from, to, name, count) {
    this.#hot.norm(from, to, this.#at[`${name}.weight`], this.#at[`${name}.bias`] ?? 0, count, this.#c.centre);
  }

  #product(from, inputs, name, to, add) {
    const at = this.#at, groups = Math.ceil(inputs / GROUP), panels = this.#sizes[name] / (groups * GROUP_BYTES);
    this.#hot.quantize(from, groups, at.whole, at.scales);
    this.#hot.product(at[`${name}.weight`], at.whole, at.scales, groups, panels, to, at[`${name}.bias`] ?? 0, add);
  }

  #attention(layer, position, block) {
    const c = this.#c, at = this.#at, hot = this.#hot, padded = up(c.head_width, LANES), room = up(c.context, LANES) * padded * F32;
    const scale = Math.fround(Math.fround(1.442695041) / Math.fround(Math.sqrt(c.head_width)));
    const place = (group) => (layer * c.kv_heads + group) * room;
    const panel = Math.floor(position / LANES) * padded * LANES * F32 + (position % LANES) * F32;
    for (let group = 0; group < c.kv_heads; group++) {
      const key = this.#turned(at.y + (c.heads + group) * c.head_width * F32, position, `${block}attention.k_norm`);
      const value = at.y + (c.heads + c.kv_heads + group) * c.head_width * F32;
      hot.place(key, at.keys + place(group) + panel, c.head_width, LANES * F32);
      hot.place(value, at.values + place(group) + position * padded * F32, c.head_width, F32);
    }
    for (let head = 0; head < c.heads; head++) {
      const query = this.#turned(at.y + head * c.head_width * F32, position, `${block}attention.q_norm`);
      hot.place(query, at.query, c.head_width, F32);
      const from = place(Math.floor((head * c.kv_heads) / c.heads));
      hot.attend(at.query, at.keys + from, at.values + from, position + 1, padded, padded, scale, at.scores, at.mixed + head * c.head_width * F32);
    }
  }

  /** A query or key, normed and rotated as the model wants it; where it stands then. */
  #turned(from, position, norm) {
    const c = this.#c, at = this.#at, half = c.head_width / 2;
    let place = from;
    if (c.qk_norm) this.#norm(from, (place = at.head), norm, c.head_width);
    if (c.positions === "rope") this.#hot.rotate(place, at.cos + position * half * F32, at.sin + position * half * F32, half);
    return place;
  }
}
