// How training goes: figures, curves and the stories told on the way.

import { Chart, ticks } from "./chart.js";
import { byId, compact, duration, element, whole } from "./dom.js";
import { run } from "./run.js";

const AXES = {
  steps: { name: "Steps", of: (row) => row.step, show: (x) => (x < 1e5 ? whole(x) : compact(x)), ticks },
  time: { name: "Time", of: (row) => row.seconds, show: duration, ticks: (from, to, count) => ticks(from, to, count, TIMES) },
  tokens: { name: "Tokens", of: (row) => row.tokens, show: compact, ticks },
};
const TIMES = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800];
const FIRST_SAMPLES = 6;

let axis = AXES.steps;
let charts = null;
let cursor = null; // index of a row
let everySample = false;
let shownSamples = "";

export function startTraining() {
  byId("axis").append(...Object.entries(AXES).map(([key, { name }]) => axisButton(key, name)));
  byId("whole").addEventListener("change", draw);
  byId("more-samples").addEventListener("click", () => {
    everySample = true;
    samples();
  });
  run.addEventListener("figures", showTraining);
  run.addEventListener("samples", showTraining);
  run.addEventListener("change", showTraining);
}

/** Bring the panel up to date; does nothing while it is hidden. */
export function showTraining() {
  if (byId("panel-training").hidden) return;
  byId("training-empty").hidden = run.rows.length > 0;
  byId("charts").hidden = run.rows.length === 0;
  tiles();
  progress();
  samples();
  if (run.rows.length) draw();
}

// ── figures ──

function tiles() {
  const last = run.rows.at(-1), best = bestRow(), floor = run.info?.floor_bits_per_byte;
  const above = best && floor ? `${(best.valid_bits_per_byte - floor).toFixed(3)} above the floor` : "lower is better";
  const entries = last ? [
    ["Step", whole(last.step), `${compact(last.tokens)} tokens`],
    ["Bits per byte", best ? best.valid_bits_per_byte.toFixed(3) : "–", best ? above : "comes with the first evaluation"],
    ["Training loss", number(last.train_loss, 3), "nats per token"],
    ["Speed", compact(last.tokens_per_second ?? 0), "tokens per second"],
    ["Time", duration(last.seconds), run.info?.parameters ? `${compact(run.info.parameters)} parameters` : ""],
  ] : [];
  byId("tiles").replaceChildren(...entries.map(([name, value, note]) =>
    element("div", { class: "tile" }, element("dt", {}, name), element("dd", {}, value), element("dd", { class: "note" }, note))));
}

function bestRow() {
  const judged = run.rows.filter((row) => row.valid_bits_per_byte != null);
  return judged.length ? judged.reduce((a, b) => (b.valid_bits_per_byte < a.valid_bits_per_byte ? b : a)) : null;
}

const number = (value, digits) => (value == null ? "–" : value.toFixed(digits));

/** How far training is, and how long it still takes: by steps, by minutes, whichever ends first. */
export function forecast(rows, { total_steps: steps, minutes }) {
  const last = rows.at(-1);
  if (!last || (!steps && !minutes)) return null;
  const before = rows.at(-Math.min(rows.length, 20));
  const pace = last.seconds > before.seconds ? (last.step - before.step) / (last.seconds - before.seconds) : last.step / last.seconds;
  const ends = [];
  if (steps) ends.push([last.step / steps, (steps - last.step) / pace]);
  if (minutes) ends.push([last.seconds / (60 * minutes), 60 * minutes - last.seconds]);
  const [share, left] = ends.reduce((a, b) => (b[1] < a[1] ? b : a));
  return { share: Math.max(0, Math.min(1, share)), left: Math.max(0, left) };
}

function progress() {
  const known = run.info && forecast(run.rows, run.info);
  byId("progress-box").hidden = !known;
  if (!known) return;
  const percent = Math.round(100 * known.share);
  const goal = run.info.minutes ? `${run.info.minutes} minutes` : `${whole(run.info.total_steps)} steps`;
  byId("progress-fill").style.width = `${100 * known.share}%`;
  byId("progress").setAttribute("aria-valuenow", percent);
  const state = run.info.training ? `about ${duration(known.left)} left` : known.share > 0.985 ? "finished" : "paused";
  byId("progress-text").textContent = `${percent} % of ${goal} · ${state}`;
  byId("progress").setAttribute("aria-valuetext", byId("progress-text").textContent);
}

// ── curves ──

function axisButton(key, name) {
  const button = element("button", { role: "radio", "aria-checked": String(AXES[key] === axis), tabindex: AXES[key] === axis ? "0" : "-1" }, name);
  button.addEventListener("click", () => choose(button, key));
  button.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const buttons = [...byId("axis").children], keys = Object.keys(AXES);
    const next = (buttons.indexOf(button) + move + keys.length) % keys.length;
    choose(buttons[next], keys[next]);
    buttons[next].focus();
  });
  return button;
}

function choose(button, key) {
  axis = AXES[key];
  for (const other of byId("axis").children) {
    other.setAttribute("aria-checked", String(other === button));
    other.tabIndex = other === button ? 0 : -1;
  }
  draw();
}

function startCharts() {
  const make = (id, title, height) => new Chart(byId(id), { title, height, onpoint, onkey });
  charts = {
    loss: make("chart-loss", "How well it predicts", 300),
    lr: make("chart-lr", "Learning rate", 130),
    speed: make("chart-speed", "Speed, tokens per second", 130),
    memory: make("chart-memory", "Memory, GiB", 130),
  };
}

function draw() {
  if (!charts) startCharts();
  const rows = run.rows, last = axis.of(rows.at(-1));
  const x = [Math.min(0, axis.of(rows[0])), last], common = { x, xShow: axis.show, xTicks: axis.ticks, floor: null };
  charts.loss.set({ ...common, ...lossLines(rows, x) });
  const small = (key, kind, yShow, factor = 1) => {
    const points = points_(rows, key, factor), top = Math.max(...points.map(([, y]) => (Number.isFinite(y) ? y : 0)), 1e-12);
    return { ...common, y: [0, 1.12 * top], yShow, lines: [{ name: "", kind, points }] };
  };
  charts.lr.set(small("lr", "lr", (y) => (y === 0 ? "0" : trimmed(y))));
  charts.speed.set(small("tokens_per_second", "speed", compact));
  charts.memory.set(small("memory_bytes", "memory", (y) => `${Number(y.toPrecision(3))}`, 1 / 2 ** 30));
  point(cursor);
}

const points_ = (rows, key, factor = 1) => rows.map((row) => [axis.of(row), row[key] == null ? NaN : factor * row[key]]);
const trimmed = (y) => (y < 1e-3 ? y.toExponential(1) : String(Number(y.toPrecision(3))));

/** Both losses in bits per byte. One nat per token is as many bits per byte everywhere in a run, so any evaluation
 * gives the factor; before the first one the training loss stands alone, in nats per token. */
function lossLines(rows, x) {
  const judged = rows.filter((row) => row.valid_bits_per_byte != null);
  const factor = judged.length && judged.at(-1).valid_loss ? judged.at(-1).valid_bits_per_byte / judged.at(-1).valid_loss : null;
  const train = points_(rows, "train_loss", factor ?? 1);
  const valid = judged.map((row) => [axis.of(row), row.valid_bits_per_byte]);
  const floor = factor && run.info?.floor_bits_per_byte ? { y: run.info.floor_bits_per_byte, name: "the least that is possible" } : null;
  const marks = factor ? (run.info?.floors ?? []).map(({ name, bits_per_byte: y }) => ({ y, name: `a ${name}` })) : [];
  const show = (y) => y.toFixed(3);
  const unit = factor ? "bits per byte" : "nats per token";
  const lines = [{ name: factor ? "while training" : `training loss, ${unit}`, kind: "train", points: train, show }];
  if (valid.length) lines.push({ name: `on unseen text, ${unit}`, kind: "valid", points: valid, dots: true, show });
  return { y: lossRange([...train, ...valid], x, floor), yShow: (y) => String(Number(y.toPrecision(3))), lines, floor, marks };
}

/** The first steps fall from so high that nothing else could be seen; unless asked for, they leave at the top. */
function lossRange(points, [from, to], floor) {
  const late = byId("whole").checked || points.length < 20 ? points : points.filter(([x]) => x > from + 0.06 * (to - from));
  const values = (late.length > 5 ? late : points).map(([, y]) => y).filter(Number.isFinite);
  const low = Math.min(...values, floor?.y ?? Infinity), high = Math.max(...values);
  const margin = 0.09 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [Math.max(0, low - margin), high + margin];
}

// ── pointing ──

function onpoint(x) {
  if (x === null) return point(null);
  const rows = run.rows;
  point(rows.reduce((best, row, index) => (Math.abs(axis.of(row) - x) < Math.abs(axis.of(rows[best]) - x) ? index : best), 0));
}

function onkey(move) {
  const end = run.rows.length - 1;
  point(move === "first" ? 0 : move === "last" ? end : Math.max(0, Math.min(end, (cursor ?? end) + move)));
}

function point(index) {
  cursor = index;
  const row = index === null ? null : run.rows[index];
  for (const chart of Object.values(charts)) chart.point(row ? axis.of(row) : null, row ? spoken(row) : "");
  byId("chart-at").textContent = row ? `step ${whole(row.step)} · ${duration(row.seconds)} · ${compact(row.tokens)} tokens` : "";
}

function spoken(row) {
  const judged = row.valid_bits_per_byte != null ? `, ${row.valid_bits_per_byte.toFixed(3)} bits per byte` : "";
  return `Step ${whole(row.step)}, training loss ${number(row.train_loss, 3)}${judged}, ${whole(row.tokens_per_second ?? 0)} tokens per second`;
}

// ── stories ──

function samples() {
  const newest = [...run.samples].reverse(), shown = everySample ? newest : newest.slice(0, FIRST_SAMPLES);
  byId("samples-box").hidden = newest.length === 0;
  byId("more-samples").hidden = shown.length === newest.length;
  const state = JSON.stringify(shown.map(({ step }) => [step, run.bitsPerByte(step)]));
  if (state === shownSamples) return;
  shownSamples = state;
  byId("samples").replaceChildren(...shown.map(sample));
}

function sample({ step, prompt, text }) {
  const bits = run.bitsPerByte(step);
  return element("li", {},
    element("p", { class: "when" }, element("b", {}, `Step ${whole(step)}`), bits === null ? "" : ` ${bits.toFixed(3)} bits per byte`),
    element("p", { class: "tale", dir: "auto" }, element("span", { class: "prompt" }, prompt ?? ""), text ?? ""));
}
