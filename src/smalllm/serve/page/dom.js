// Elements, storage and numbers. Text enters the document only as text nodes: whatever a model, a run or a prompt
// contains, it can never become an element.

/** The element with an id that index.html promises. */
export const byId = (id) => document.getElementById(id);

/** element("button", { class: "link", onclick: f, "aria-label": "…" }, "text", child) */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A sentence for screen readers. */
export function announce(text) {
  byId("live").textContent = text;
}

/** localStorage or sessionStorage that never throws: private windows may refuse it. */
export function stored(storage, key) {
  try { return window[storage].getItem(key); } catch { return null; }
}
export function store(storage, key, value) {
  try {
    if (value === null) window[storage].removeItem(key);
    else window[storage].setItem(key, value);
  } catch { /* forgotten when the page is left */ }
}

/** 1234567 -> "1,234,567" */
export const whole = (number) => Math.round(number).toLocaleString("en-US");

/** 1234567 -> "1.23 M" */
export function compact(number) {
  for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (Math.abs(number) >= size) return trim((number / size).toPrecision(3)) + unit;
  }
  return trim(number.toPrecision(3));
}
const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

/** Seconds -> "42 s", "3 min 05 s", "2 h 10 min" */
export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} min`;
}

/** Probability -> "62 %", "0.4 %", "< 0.1 %" */
export function percent(probability) {
  const value = 100 * probability;
  if (value >= 99.5 || value === 0) return `${Math.round(value)} %`;
  if (value >= 10) return `${value.toFixed(0)} %`;
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
}
