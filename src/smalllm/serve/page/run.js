// What the server says about the run, asked for every two seconds while the page is visible. Others listen:
// "change" when something changed, "newer" when a newer checkpoint came, "figures" and "samples" when there are more of
// them, "reach" when the server went or returned.

import { get, ServerError } from "./api.js";

export const POLL_MS = 2000;

class Run extends EventTarget {
  info = null; // GET /run
  rows = []; // GET /run/metrics, ordered by step
  samples = []; // GET /run/samples
  reachable = true;
  locked = false; // a key is needed and was not given
  watched = false; // whether anyone looks at metrics and samples
  #last = "";
  #timer = 0;
  #busy = false;
  #again = false; // someone asked while an answer was awaited
  #sampled = false;

  start() {
    document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(this.#timer) : this.poll()));
    return this.poll({ ask: true });
  }

  /** Ask now, and again after two seconds. */
  async poll({ ask = false } = {}) {
    clearTimeout(this.#timer);
    if (this.#busy) return void (this.#again = true);
    this.#busy = true;
    try {
      this.#take(await get("run", { ask }));
      if (this.watched) await this.#figures();
      else if (!this.#sampled) await this.#stories();
      this.#reach(true, false);
    } catch (error) {
      this.#reach(error instanceof ServerError, error.status === 401);
    }
    this.#busy = false;
    if (!document.hidden) this.#timer = setTimeout(() => this.poll(), this.#again ? 0 : POLL_MS);
    this.#again = false;
  }

  /** Bits per byte of a checkpoint, from an evaluation at its step or shortly before; null when there is none. */
  bitsPerByte(step) {
    const near = this.rows.findLast((row) => row.step <= step && row.valid_bits_per_byte != null);
    return near && near.step >= 0.95 * step ? near.valid_bits_per_byte : null;
  }

  #take(info) {
    const text = JSON.stringify(info);
    if (text === this.#last) return;
    const before = this.info;
    this.info = info;
    this.#last = text;
    if (before && (before.name !== info.name || info.step < before.step)) this.#forget(); // begun anew
    this.#tell("change");
    if (before && info.step > before.step) this.#tell("newer");
  }

  async #figures() {
    const after = this.rows.length ? this.rows.at(-1).step : -1;
    const { rows } = await get(`run/metrics?after=${after}`);
    if (rows.length) {
      const known = new Map(this.rows.map((row) => [row.step, row]));
      for (const row of rows) known.set(row.step, row);
      this.rows = [...known.values()].sort((a, b) => a.step - b.step);
    }
    if (rows.length || !this.#sampled) await this.#stories();
    if (rows.length) this.#tell("figures");
  }

  async #stories() {
    const { rows } = await get("run/samples");
    const news = rows.length !== this.samples.length;
    this.samples = rows;
    this.#sampled = true;
    if (news) this.#tell("samples");
  }

  #forget() {
    this.rows = [];
    this.samples = [];
    this.#sampled = false;
  }

  #reach(reachable, locked) {
    if (reachable === this.reachable && locked === this.locked) return;
    this.reachable = reachable;
    this.locked = locked;
    this.#tell("reach");
  }

  #tell(type) {
    this.dispatchEvent(new Event(type));
  }
}

export const run = new Run();
