// The storyteller behind the page, in a Worker where the browser allows one. It is asked by messages and tells by messages:
// {load: about, text} -> {ready: milliseconds}; {tell: number, prompt, params} -> {told: number, text, tokens, finish}, often;
// {stop: true}. Whatever goes wrong becomes {trouble: sentence}.

const YIELD = 30; // milliseconds between looks at the messages

/** Text from tokens in whole characters, without anything that may be the beginning of a stop string. */
class Row {
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #held = "";
  finish = null;

  constructor(ids, params, tokenizer) {
    Object.assign(this, { ids, params, tokenizer, prompt: ids.length });
    this.stops = params.stop.filter(Boolean);
  }

  get tokens() {
    return this.ids.length - this.prompt;
  }

  /** Take the next token; the text that it makes certain. */
  push(id) {
    if (id === EOS) return this.#end("stop");
    this.ids.push(id);
    const text = this.#search(this.#decoder.decode(this.tokenizer.bytesOf(id), { stream: true }));
    return this.finish || this.tokens < this.params.max_tokens ? text : text + this.#end("length");
  }

  #end(reason) {
    const text = this.#search(this.#decoder.decode());
    if (this.finish) return text;
    this.finish = reason;
    return text + this.#held;
  }

  #search(piece) {
    const text = this.#held + piece;
    this.#held = "";
    const ends = this.stops.filter((stop) => text.includes(stop)).map((stop) => [text.indexOf(stop) + stop.length, text.indexOf(stop)]);
    if (ends.length) {
      this.finish = "stop";
      return text.slice(0, ends.sort((a, b) => a[0] - b[0] || a[1] - b[1])[0][1]);
    }
    const longest = Math.max(0, ...this.stops.map((stop) => stop.length - 1));
    for (let length = Math.min(longest, text.length); length > 0; length--) {
      if (!this.stops.some((stop) => stop.startsWith(text.slice(-length)))) continue;
      this.#held = text.slice(-length);
      return text.slice(0, -length);
    }
    return text;
  }
}

/** Reads a row's tokens and chooses the next. A text that outgrows the context goes on from the context's last half. */
class Teller {
  #first = 0; // place among the ids of the context's position 0
  #read = 0;

  constructor(model, row, forbidden) {
    Object.assign(this, { model, row, forbidden, random: new Random(`${row.params.seed} 0`) });
  }

  /** Read one token; the text of a new one, or null while the prompt is read. */
  step() {
    const { model, row } = this, { ids } = row;
    if (ids.length - this.#first > model.context) {
      this.#first = ids.length - Math.max(1, Math.floor(model.context / 2));
      this.#read = 0;
    }
    const place = this.#first + this.#read, last = place + 1 === ids.length;
    const logits = model.step(ids[place], this.#read++, last);
    if (!last) return null;
    const id = choose(logits, row.params, ids, this.forbidden, this.random);
    if (id < 0) throw new Error("the model’s numbers are broken (NaN or infinity); export another checkpoint");
    return row.push(id);
  }
}

class Engine {
  #port;
  #model = null;
  #tokenizer = null;
  #forbidden = [];
  #now = 0; // number of the telling that goes on, 0 for none

  constructor(port) {
    this.#port = port;
    port.onmessage = ({ data }) => this.#hear(data).catch((error) => port.postMessage({ trouble: error.message, told: data.tell }));
  }

  async #hear(message) {
    if (message.load) await this.#load(message.load, message.text);
    else if (message.tell) await this.#tell(message);
    else this.#now = 0;
  }

  async #load(about, text) {
    const began = performance.now();
    const bytes = fromBase64(text);
    if (bytes.length !== about.bytes) throw new Error(`this file is damaged: it holds ${bytes.length} bytes of the model, not ${about.bytes}`);
    const { offset, size } = about.tokenizer;
    this.#tokenizer = new Tokenizer(bytes.subarray(offset, offset + size));
    this.#model = await Model.load(about, bytes);
    this.#forbidden = [UNK, BOS];
    for (let id = this.#tokenizer.size; id < this.#model.vocab; id++) this.#forbidden.push(id);
    this.#port.postMessage({ ready: performance.now() - began });
  }

  async #tell({ tell, prompt, params }) {
    this.#now = tell;
    const row = new Row([BOS, ...this.#tokenizer.encode(prompt.toWellFormed?.() ?? prompt)], params, this.#tokenizer);
    const teller = new Teller(this.#model, row, this.#forbidden);
    let text = "", since = performance.now();
    while (!row.finish && this.#now === tell) {
      text += teller.step() ?? "";
      if (performance.now() - since < YIELD) continue;
      this.#port.postMessage({ told: tell, text, tokens: row.tokens, finish: null });
      text = "";
      await pause();
      since = performance.now();
    }
    this.#port.postMessage({ told: tell, text, tokens: row.tokens, finish: row.finish ?? "stopped" });
  }
}

/** Lets messages in. setTimeout would wait 4 ms. */
function pause() {
  return new Promise((resume) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resume();
    };
    port2.postMessage(null);
  });
}

function fromBase64(text) {
  if (text.length % 4) throw new Error("this file is damaged: the model in it is cut off");
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text); // browsers from 2025 on: four times as fast
  const STEP = 1 << 20, bytes = new Uint8Array((text.length / 4) * 3 - text.match(/=*$/)[0].length);
  for (let from = 0, place = 0; from < text.length; from += STEP) {
    const part = atob(text.slice(from, from + STEP));
    for (let i = 0; i < part.length; i++) bytes[place++] = part.charCodeAt(i);
  }
  return bytes;
}
