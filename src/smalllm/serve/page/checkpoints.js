// The same beginning and seed, told by several checkpoints side by side.

import { announce, byId, element, stored, store, whole } from "./dom.js";
import { run } from "./run.js";
import { chosenSettings, digitsOnly, seedOf } from "./settings.js";
import { tokensOf } from "./tale.js";

const MOST_COLUMNS = 4;
const PROMPT_KEY = "smalllm.compare";

const columns = [];
let touched = false; // the reader chose columns; until then they follow the run

export function startCheckpoints() {
  byId("compare-prompt").value = stored("sessionStorage", PROMPT_KEY) ?? "Once upon a time";
  byId("compare-prompt").addEventListener("input", () => store("sessionStorage", PROMPT_KEY, byId("compare-prompt").value));
  digitsOnly(byId("compare-seed"));
  byId("compare").addEventListener("click", () => (telling() ? stopAll() : tellAll()));
  byId("add-column").addEventListener("click", () => {
    touched = true;
    const free = run.info.steps.filter((step) => !columns.some((column) => column.step === step));
    columns.push(new Column(free.at(-1) ?? run.info.steps.at(-1)));
    columns.sort((a, b) => a.step - b.step);
    place();
  });
  run.addEventListener("change", showCheckpoints);
  run.addEventListener("figures", () => columns.forEach((column) => column.judge()));
}

export function showCheckpoints() {
  if (byId("panel-checkpoints").hidden || !run.info) return;
  const { steps } = run.info;
  byId("compare-empty").hidden = steps.length > 0;
  byId("compare").disabled = steps.length === 0;
  if (!touched && !columns.some((column) => column.began)) {
    columns.splice(0, columns.length, ...spread(steps, MOST_COLUMNS).map((step) => new Column(step)));
    place();
  }
  for (const column of columns) column.offer(steps);
  showState();
}

/** The first, the newest, and between them steps that grow by about the same factor.
 *
 *  spread([1, 10, 100, 1000, 2000], 4) -> [1, 10, 100, 2000] */
export function spread(steps, count) {
  if (steps.length <= count) return [...steps];
  const first = Math.max(1, steps[0]), ratio = steps.at(-1) / first, chosen = new Set([0, steps.length - 1]);
  for (let part = 1; part < count - 1; part++) {
    const goal = Math.log(first * ratio ** (part / (count - 1)));
    const distance = (index) => (chosen.has(index) ? Infinity : Math.abs(Math.log(Math.max(1, steps[index])) - goal));
    chosen.add(steps.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0));
  }
  return [...chosen].sort((a, b) => a - b).map((index) => steps[index]);
}

export function compareNow() {
  if (telling() || !columns.length) return false;
  tellAll();
  return true;
}
export function stopAll() {
  if (!telling()) return false;
  columns.forEach((column) => column.stop());
  return true;
}

const telling = () => columns.some((column) => column.controller);

function tellAll() {
  trouble("");
  if (!byId("compare-seed").value) byId("compare-seed").value = String(seedOf(byId("compare-seed")));
  columns.forEach((column) => column.tell());
  announce(`${columns.length} checkpoints are telling`);
}

function place() {
  byId("columns").replaceChildren(...columns.map((column) => column.node));
  showState();
}

function showState() {
  byId("compare").textContent = telling() ? "Stop" : "Tell all";
  byId("compare").classList.toggle("stopping", telling());
  byId("add-column").hidden = columns.length >= Math.min(MOST_COLUMNS, run.info?.steps.length ?? 0);
  for (const column of columns) column.close.hidden = columns.length < 2;
}

function trouble(text) {
  byId("compare-trouble").hidden = !text;
  byId("compare-trouble").textContent = text;
}

/** One checkpoint: its step, a slider to another one, its text. */
class Column {
  controller = null;
  began = false;
  #steps = [];
  #title = element("h2");
  #bits = element("p", { class: "note" });
  #slider = element("input", { type: "range", min: 0, step: 1, "aria-label": "Checkpoint" });
  #text = element("div", { class: "tale", dir: "auto" });

  constructor(step) {
    this.step = step;
    this.close = element("button", { class: "round", "aria-label": "Remove this checkpoint", onclick: () => this.#remove() }, "×");
    this.node = element("article", { class: "column paper" },
      element("header", {}, element("div", {}, this.#title, this.#bits), this.close), this.#slider, this.#text);
    this.#slider.addEventListener("input", () => {
      touched = true;
      this.step = this.#steps[Number(this.#slider.value)];
      this.#show();
    });
    this.#slider.addEventListener("change", () => this.began && this.tell());
    this.offer(run.info.steps);
  }

  /** The checkpoints there are now; the slider keeps its step, or the nearest one that is left. */
  offer(steps) {
    this.#steps = steps;
    if (!steps.length) return;
    const index = steps.reduce((best, step, at) => (Math.abs(step - this.step) < Math.abs(steps[best] - this.step) ? at : best), 0);
    if (!this.controller && !this.began) this.step = steps[index];
    this.#slider.max = steps.length - 1;
    this.#slider.value = index;
    this.#slider.disabled = steps.length < 2;
    this.#show();
  }

  judge() {
    const bits = run.bitsPerByte(this.step);
    this.#bits.textContent = bits === null ? "" : `${bits.toFixed(3)} bits per byte`;
  }

  async tell() {
    this.stop();
    const own = (this.controller = new AbortController()), prompt = byId("compare-prompt").value;
    this.began = true;
    this.#text.replaceChildren(element("span", { class: "prompt" }, prompt));
    this.#text.classList.add("telling");
    showState();
    try {
      const body = { model: `${run.info.name}@${this.step}`, prompt, ...chosenSettings(), seed: seedOf(byId("compare-seed")) };
      for await (const { tokens, finish } of tokensOf(body, own.signal, () => {})) {
        if (own !== this.controller) return;
        this.#text.append(tokens.map((token) => token.text).join(""));
        if (finish === "stop") this.#text.append(element("span", { class: "ending" }, "The end"));
      }
    } catch (error) {
      if (error.name !== "AbortError") this.#text.append(element("span", { class: "trouble", role: "alert" }, error.message));
    }
    if (own === this.controller) this.stop();
  }

  stop() {
    this.controller?.abort();
    this.controller = null;
    this.#text.classList.remove("telling");
    showState();
  }

  #remove() {
    touched = true;
    this.stop();
    columns.splice(columns.indexOf(this), 1);
    place();
    byId("add-column").focus();
  }

  #show() {
    const newest = this.step === this.#steps.at(-1) ? ", the newest" : "";
    this.#title.textContent = `Step ${whole(this.step)}`;
    this.#slider.style.setProperty("--filled", `${(100 * this.#steps.indexOf(this.step)) / Math.max(1, this.#steps.length - 1)}%`);
    this.#slider.setAttribute("aria-valuetext", `Step ${whole(this.step)}${newest}`);
    this.judge();
  }
}
