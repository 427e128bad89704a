// SentencePiece BPE with byte fallback, from the bytes of tokenizer.model: the ids and texts of smalllm's tokenizer.py.

const SPACE_MARK = "\u2581";
const NORMAL = 1, UNKNOWN = 2, CONTROL = 3, BYTE = 6; // kinds of pieces in sentencepiece_model.proto
const UNK = 0, BOS = 1, EOS = 2;

/** [number, value] of every field of a protobuf message: a number, or bytes. */
function* fields(message) {
  let place = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (; message[place] >= 128; scale *= 128) value += (message[place++] & 127) * scale;
    return value + message[place++] * scale;
  };
  while (place < message.length) {
    const key = varint();
    if ((key & 7) === 0) yield [key >>> 3, varint()];
    else {
      const size = (key & 7) === 2 ? varint() : (key & 7) === 5 ? 4 : 8;
      yield [key >>> 3, message.subarray(place, place += size)];
    }
  }
}

class Tokenizer {
  #merges = new Map(); // text of a piece -> id
  #scores = [];
  #bytes = []; // of each id
  #byteIds = new Array(256);

  constructor(model) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    for (const [number, value] of fields(model)) if (number === 1) this.#add(value, decoder);
    this.size = this.#bytes.length;
  }

  #add(message, decoder) {
    const id = this.#bytes.length;
    let text = "", score = 0, kind = NORMAL;
    for (const [number, value] of fields(message)) {
      if (number === 1) text = decoder.decode(value);
      else if (number === 2) score = new DataView(value.buffer, value.byteOffset).getFloat32(0, true);
      else if (number === 3) kind = value;
    }
    this.#scores.push(score);
    if (kind === BYTE) {
      const byte = parseInt(text.slice(3, 5), 16);
      this.#byteIds[byte] = id;
      this.#bytes.push(Uint8Array.of(byte));
    } else if (kind === CONTROL) this.#bytes.push(new Uint8Array());
    else if (kind === UNKNOWN) this.#bytes.push(utf8("\ufffd"));
    else {
      this.#merges.set(text, id);
      this.#bytes.push(utf8(text.replaceAll(SPACE_MARK, " ")));
    }
  }

  /** The bytes that a token adds to the text. */
  bytesOf(id) {
    return this.#bytes[id];
  }

  /** The ids of a text, without begin and end. */
  encode(text) {
    const ids = [];
    for (const part of text.split(/(\u2581+)/)) {
      if (part[0] === SPACE_MARK) this.#spell(part, ids);
      else if (part) this.#merge(part.replaceAll(" ", SPACE_MARK), ids);
    }
    return ids;
  }

  #spell(text, ids) {
    for (const byte of utf8(text)) ids.push(this.#byteIds[byte]);
  }

  /** Join the two neighbours whose piece has the greatest score, the leftmost of equals, until no two are a piece. */
  #merge(text, ids) {
    const symbols = Array.from(text), count = symbols.length;
    const before = symbols.map((_, place) => place - 1), after = symbols.map((_, place) => place + 1);
    const agenda = new Agenda();
    const consider = (left, right) => {
      if (left < 0 || right >= count) return;
      const id = this.#merges.get(symbols[left] + symbols[right]);
      if (id !== undefined) agenda.push({ left, right, score: this.#scores[id], size: symbols[left].length + symbols[right].length });
    };
    for (let place = 0; place + 1 < count; place++) consider(place, place + 1);
    for (let pair = agenda.pop(); pair; pair = agenda.pop()) {
      const { left, right, size } = pair;
      if (!symbols[left] || !symbols[right] || symbols[left].length + symbols[right].length !== size) continue; // of the past
      symbols[left] += symbols[right];
      symbols[right] = "";
      after[left] = after[right];
      if (after[right] < count) before[after[right]] = left;
      consider(before[left], left);
      consider(left, after[left]);
    }
    for (const symbol of symbols) {
      if (!symbol) continue;
      const id = this.#merges.get(symbol);
      if (id === undefined) this.#spell(symbol, ids);
      else ids.push(id);
    }
  }
}

/** A heap of pairs: the greatest score first, of equals the leftmost. */
class Agenda {
  #pairs = [];

  #sooner(a, b) {
    const x = this.#pairs[a], y = this.#pairs[b];
    return x.score > y.score || (x.score === y.score && x.left < y.left);
  }

  #swap(a, b) {
    [this.#pairs[a], this.#pairs[b]] = [this.#pairs[b], this.#pairs[a]];
  }

  push(pair) {
    let place = this.#pairs.push(pair) - 1;
    for (let above = (place - 1) >> 1; place > 0 && this.#sooner(place, above); place = above, above = (place - 1) >> 1) this.#swap(place, above);
  }

  pop() {
    const pairs = this.#pairs;
    if (pairs.length < 2) return pairs.pop();
    this.#swap(0, pairs.length - 1);
    const first = pairs.pop();
    for (let place = 0; ;) {
      let best = place;
      for (const below of [2 * place + 1, 2 * place + 2]) if (below < pairs.length && this.#sooner(below, best)) best = below;
      if (best === place) return first;
      this.#swap(place, best);
      place = best;
    }
  }
}

const utf8 = (text) => new TextEncoder().encode(text);
