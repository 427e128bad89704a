// The page: a beginning, the text that the model adds to it, and sliders. Text enters the document only as text nodes:
// whatever a model, its name or a prompt contains, it can never become an element.

const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** localStorage that never throws: pages from a disk and private windows may not have one. */
const memory = {
  get(key) {
    try { return localStorage.getItem(`smalllm.${key}`); } catch { return null; }
  },
  set(key, value) {
    try { localStorage.setItem(`smalllm.${key}`, value); } catch { /* forgotten when the page is left */ }
  },
};

const announce = (text) => (byId("live").textContent = text);

// ── light and dark ──

const NEXT = { system: "light", light: "dark", dark: "system" }, SIGN = { system: "◐", light: "☀", dark: "☾" };
let theme = memory.get("theme") in NEXT ? memory.get("theme") : "system";
document.documentElement.dataset.theme = theme;

function startTheme() {
  const button = byId("theme");
  const show = () => {
    document.documentElement.dataset.theme = theme;
    button.textContent = SIGN[theme];
    button.title = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Theme: ${theme}. Change to ${NEXT[theme]}`);
  };
  button.addEventListener("click", () => {
    theme = NEXT[theme];
    memory.set("theme", theme);
    show();
  });
  show();
}

// ── settings ──

const two = (value) => value.toFixed(2);
const SETTINGS = [
  { key: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, usual: 0.8, show: two,
    help: "Low is careful, high is bold. 0 always takes the likeliest piece." },
  { key: "max_tokens", label: "Length", min: 10, max: 1000, step: 10, usual: 200, show: String,
    help: "How many pieces at most. A story may end sooner." },
  { key: "top_k", label: "Top-k", min: 0, max: 200, step: 1, usual: 0, off: 0, show: String,
    help: "Only the k likeliest pieces may come." },
  { key: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.01, usual: 1, off: 1, show: two,
    help: "Only the likeliest pieces, up to this share of the probability." },
  { key: "min_p", label: "Min-p", min: 0, max: 0.5, step: 0.01, usual: 0, off: 0, show: two,
    help: "Only pieces with at least this share of the likeliest one’s probability." },
  { key: "repetition_penalty", label: "Repetition penalty", min: 1, max: 2, step: 0.01, usual: 1, off: 1, show: two,
    help: "Makes what was already said less likely." },
];
const values = {};

/** The seed in the field, or a random one that is small enough to be typed again. */
function seed() {
  const digits = byId("seed").value.replace(/\D/g, "");
  return digits ? Number(digits) : Math.floor(Math.random() * 1_000_000);
}

const params = () => ({ ...values, seed: seed(), stop: [byId("stop-text").value] });

function startSettings() {
  const kept = keptSettings();
  for (const setting of SETTINGS) values[setting.key] = kept[setting.key] ?? setting.usual;
  byId("sliders").append(...SETTINGS.map(slider));
  SETTINGS.forEach(showSetting);
  byId("reset").addEventListener("click", () => {
    for (const setting of SETTINGS) {
      byId(setting.key).value = values[setting.key] = setting.usual;
      showSetting(setting);
    }
    byId("seed").value = byId("stop-text").value = "";
    memory.set("page", JSON.stringify(values));
  });
  byId("seed").addEventListener("input", ({ target }) => {
    if (/\D/.test(target.value)) target.value = target.value.replace(/\D/g, "");
  });
  const fold = byId("settings-fold"), wide = matchMedia("(min-width: 62rem)");
  const follow = () => (fold.open = wide.matches);
  wide.addEventListener("change", follow);
  follow();
}

function keptSettings() {
  let record;
  try { record = JSON.parse(memory.get("page")) ?? {}; } catch { record = {}; }
  const fits = ({ key, min, max }) => typeof record[key] === "number" && record[key] >= min && record[key] <= max;
  return Object.fromEntries(SETTINGS.filter(fits).map(({ key }) => [key, record[key]]));
}

function slider(setting) {
  const { key, label, min, max, step, help } = setting;
  const input = element("input", { id: key, type: "range", min, max, step, "aria-describedby": `${key}-help` });
  input.value = values[key];
  input.addEventListener("input", () => {
    values[key] = Number(input.value);
    showSetting(setting);
    memory.set("page", JSON.stringify(values));
  });
  return element("div", { class: "setting" },
    element("label", { for: key }, label), element("output", { id: `${key}-value`, for: key }), input,
    element("p", { id: `${key}-help` }, help));
}

function showSetting({ key, off, min, max, show }) {
  const isOff = values[key] === off, text = isOff ? "off" : show(values[key]);
  byId(`${key}-value`).textContent = text;
  byId(`${key}-value`).classList.toggle("off", isOff);
  byId(key).setAttribute("aria-valuetext", text);
  byId(key).style.setProperty("--filled", isOff ? "0%" : `${(100 * (values[key] - min)) / (max - min)}%`);
}

// ── telling ──

let port = null; // of the engine
let number = 0; // of the last telling
let telling = false;
let story = null; // {prompt, text, tokens, seed, finish, began, last}; null while one writes
let spoken = ""; // what screen readers have not heard yet

function tell(prompt, text = "") {
  story = { prompt, text, tokens: 0, finish: null, began: performance.now(), last: 0 };
  const settings = params();
  story.seed = settings.seed;
  telling = true;
  byId("tale").replaceChildren(element("span", { class: "prompt" }, prompt), text);
  port.postMessage({ tell: ++number, prompt: prompt + text, params: settings });
  trouble("");
  announce("Telling");
  show();
}

/** The engine goes on for a moment; nobody listens. */
function stop() {
  port.postMessage({ stop: true });
  telling = false;
  story.finish = "stopped";
  speak(true);
  show();
}

function hear({ data }) {
  if (data.ready !== undefined) ready(data.ready);
  else if (data.trouble) {
    telling = false;
    trouble(`This does not work: ${data.trouble}.`);
    if (byId("tell").disabled) byId("state").textContent = "asleep";
    else show();
  } else if (data.told === number && telling) told(data);
}

function told({ text, tokens, finish }) {
  const follow = atEnd();
  story.text += text;
  story.tokens = tokens;
  story.last = performance.now();
  byId("tale").append(text);
  spoken += text;
  story.finish = finish;
  telling = finish === null;
  speak(!telling);
  if (telling) figures();
  else show();
  if (follow) byId("figures").scrollIntoView({ block: "nearest" });
}

/** Whether the end of the text is what the reader looks at. */
function atEnd() {
  const end = byId("tale").getBoundingClientRect().bottom;
  return end > 0 && end < innerHeight + 60;
}

/** Screen readers hear whole sentences. */
function speak(everything) {
  const end = everything ? spoken.length : (spoken.match(/^[^]*[.!?]["”’]?\s/)?.[0].length ?? 0);
  if (end) announce(spoken.slice(0, end));
  spoken = spoken.slice(end);
}

// ── what is seen ──

/** Everything that depends on whether one writes, the model tells, or a telling is finished. */
function show() {
  const reading = story !== null, resting = reading && !telling;
  byId("writing").hidden = reading;
  byId("tale").hidden = !reading;
  byId("tale").classList.toggle("telling", telling);
  byId("tale").setAttribute("aria-busy", String(telling));
  byId("tell").textContent = telling ? "Stop" : reading ? "Tell another" : "Tell";
  byId("tell").title = telling ? "Esc" : "Ctrl + Enter";
  byId("tell").classList.toggle("stopping", telling);
  byId("tell-hint").hidden = reading;
  byId("continue").hidden = !resting || story.finish === "stop";
  for (const id of ["edit", "copy", "new"]) byId(id).hidden = !resting;
  byId("ending").hidden = !resting || story.finish !== "stop";
  figures();
}

function figures() {
  byId("figures").hidden = !story;
  if (!story) return;
  const { tokens, began, last } = story;
  const speed = tokens ? `${Math.round((1000 * tokens) / (last - began)).toLocaleString("en-US")} per second · ` : "";
  const again = element("button", { class: "link", id: "seed-used", title: "Put this seed into the settings, to tell the same story again" }, `seed ${story.seed}`);
  again.addEventListener("click", () => {
    byId("seed").value = String(story.seed);
    byId("settings-fold").open = true;
    announce(`Seed ${story.seed} is set`);
  });
  byId("figures").replaceChildren(`${tokens.toLocaleString("en-US")} pieces · ${speed}`, again);
}

function trouble(text) {
  byId("trouble").hidden = !text;
  byId("trouble").textContent = text;
}

/** Back to writing, with a beginning. */
function write(text) {
  story = null;
  byId("prompt").value = text;
  show();
  grow();
  byId("prompt").focus();
}

/** The textarea is as high as its text. */
function grow() {
  byId("prompt").style.height = "auto";
  byId("prompt").style.height = `${byId("prompt").scrollHeight}px`;
}

async function copy() {
  const text = story.prompt + story.text;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // where a page from a disk may not
    const field = element("textarea", { class: "unseen" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  byId("copy").textContent = "Copied";
  announce("Copied");
  setTimeout(() => (byId("copy").textContent = "Copy"), 1500);
}

// ── start ──

/** A Worker from this script's own text; where a browser refuses, the same engine between the page's own moments. */
function hire() {
  try {
    const url = URL.createObjectURL(new Blob([`"use strict";(${engine})(self)`], { type: "text/javascript" }));
    const worker = new Worker(url);
    worker.onerror = () => byId("model") && hireHere(); // refused after all, before it was ready
    return worker;
  } catch {
    return hireHere();
  }
}

function hireHere() {
  const { port1, port2 } = new MessageChannel();
  engine(port1);
  load(port2);
  return port2;
}

function load(to) {
  port = to;
  port.onmessage = hear;
  port.postMessage({ load: about, text: byId("model").textContent.trimEnd() });
}

let about = null;

function ready(milliseconds) {
  byId("model").remove();
  byId("state").textContent = "works offline";
  byId("state").title = `Ready after ${Math.round(milliseconds)} ms`;
  byId("tell").disabled = false;
}

function startStory() {
  const prompt = byId("prompt");
  const act = () => (telling ? stop() : tell(story?.prompt ?? prompt.value));
  byId("tell").addEventListener("click", act);
  byId("continue").addEventListener("click", () => tell(story.prompt, story.text));
  byId("edit").addEventListener("click", () => write(story.prompt + story.text));
  byId("copy").addEventListener("click", copy);
  byId("new").addEventListener("click", () => write(""));
  prompt.addEventListener("input", grow);
  addEventListener("resize", grow);
  addEventListener("keydown", (event) => {
    if (byId("tell").disabled) return;
    if (event.key === "Escape" && telling) stop();
    else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !telling) act();
    else return;
    event.preventDefault();
  });
  byId("beginnings").append(...about.beginnings.map((text) => element("button", {
    class: "chip", onclick: () => {
      prompt.value = text;
      grow();
      prompt.focus();
    } }, text)));
}

document.addEventListener("DOMContentLoaded", () => {
  startTheme();
  try {
    about = JSON.parse(byId("about").textContent);
    if (!byId("model").textContent.endsWith("\n")) throw new Error();
  } catch {
    return trouble("This file is not complete. Ask for it again.");
  }
  byId("name").textContent = about.name;
  byId("facts").textContent = about.facts;
  startSettings();
  startStory();
  show();
  grow();
  byId("tell").disabled = true;
  const hired = hire();
  if (!port) load(hired);
});
