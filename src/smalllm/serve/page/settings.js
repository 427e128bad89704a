// The sliders and the seed. Their values outlive the page in localStorage; a value that is off is not sent.

import { byId, element, store, stored } from "./dom.js";

const KEY = "smalllm.settings";
const two = (value) => value.toFixed(2);
const integer = (value) => String(value);

const SETTINGS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, usual: 0.8, show: two,
    help: "Low is careful, high is bold. 0 always takes the likeliest piece." },
  { key: "max_tokens", label: "Length", min: 10, max: 1000, step: 10, usual: 200, show: integer,
    help: "How many pieces at most. A story may end sooner." },
  { key: "top_k", label: "Top-k", min: 0, max: 200, step: 1, usual: 0, off: 0, show: integer,
    help: "Only the k likeliest pieces may come." },
  { key: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, usual: 1, off: 1, show: two,
    help: "Only the likeliest pieces, up to this share of the probability." },
  { key: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, usual: 0, off: 0, show: two,
    help: "Only pieces with at least this share of the likeliest one’s probability." },
  { key: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.01, usual: 1, off: 1, show: two,
    help: "Makes what was already said less likely." },
];

const values = {};

/** The settings of a request: {"temperature": 0.8, "max_tokens": 200, …}; without those that are off. */
export function chosenSettings() {
  return Object.fromEntries(SETTINGS.filter(({ key, off }) => values[key] !== off).map(({ key }) => [key, values[key]]));
}

/** The seed in a field, or a random one; small enough to be typed again. */
export function seedOf(field) {
  const digits = field.value.replace(/\D/g, "");
  return digits ? Number(digits) : crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
}

/** A field in which only digits stay. */
export function digitsOnly(field) {
  field.addEventListener("input", () => {
    const digits = field.value.replace(/\D/g, "");
    if (digits !== field.value) field.value = digits;
  });
}

export function startSettings() {
  Object.assign(values, usual(), kept());
  byId("sliders").append(...SETTINGS.map(slider));
  byId("reset").addEventListener("click", () => {
    Object.assign(values, usual());
    for (const setting of SETTINGS) byId(setting.key).value = values[setting.key];
    for (const setting of SETTINGS) show(setting);
    byId("seed").value = "";
    keep();
  });
  digitsOnly(byId("seed"));
  const fold = byId("settings-fold"), wide = matchMedia("(min-width: 62rem)");
  const follow = () => (fold.open = wide.matches);
  wide.addEventListener("change", follow);
  follow();
}

const usual = () => Object.fromEntries(SETTINGS.map(({ key, usual }) => [key, usual]));

function kept() {
  let record;
  try { record = JSON.parse(stored("localStorage", KEY)) ?? {}; } catch { record = {}; }
  const fits = ({ key, min, max }) => typeof record[key] === "number" && record[key] >= min && record[key] <= max;
  return Object.fromEntries(SETTINGS.filter(fits).map(({ key }) => [key, record[key]]));
}

const keep = () => store("localStorage", KEY, JSON.stringify(values));

function slider(setting) {
  const { key, label, min, max, step, help } = setting;
  const input = element("input", { id: key, type: "range", min, max, step, "aria-describedby": `${key}-help` });
  input.value = values[key];
  input.addEventListener("input", () => {
    values[key] = Number(input.value);
    show(setting);
    keep();
  });
  const box = element("div", { class: "setting" },
    element("label", { for: key }, label), element("output", { id: `${key}-value`, for: key }), input,
    element("p", { id: `${key}-help` }, help));
  queueMicrotask(() => show(setting));
  return box;
}

function show({ key, off, min, max, show }) {
  const text = values[key] === off ? "off" : show(values[key]);
  byId(`${key}-value`).textContent = text;
  byId(key).setAttribute("aria-valuetext", text);
  byId(`${key}-value`).classList.toggle("off", values[key] === off);
  byId(key).style.setProperty("--filled", values[key] === off ? "0%" : `${(100 * (values[key] - min)) / (max - min)}%`);
}
