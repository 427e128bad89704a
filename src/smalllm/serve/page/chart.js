// A line chart in SVG, drawn anew whenever its data or its width change. It knows nothing about training: it gets
// lines of points and formats, and says over which x the reader is. Colours are classes of style.css.

import { element } from "./dom.js";

const LEFT = 46, RIGHT = 14, TOP = 10, BOTTOM = 24;

export class Chart {
  #data = null;
  #cursor = null;
  #svg = shape("svg", { "aria-hidden": "true" });
  #marks = shape("g", { class: "marks" });
  #plot;
  #readout = element("p", { class: "readout" });
  #size = [0, 0];

  /** `onpoint(x | null)`: the pointer is over x. `onkey(-1 | 1 | "first" | "last")`: an arrow, Home or End was pressed. */
  constructor(host, { title, height, onpoint, onkey }) {
    this.title = title;
    this.height = height;
    this.#plot = element("div", { class: "plot", tabindex: "0", role: "slider", "aria-label": title });
    this.#plot.style.height = `${height}px`;
    this.#plot.append(this.#svg);
    host.classList.add("chart");
    host.append(element("div", { class: "chart-head" }, element("h2", {}, title), this.#readout), this.#plot);
    this.#plot.addEventListener("pointermove", (event) => this.#data && onpoint(this.#valueAt(event.clientX)));
    this.#plot.addEventListener("pointerleave", () => onpoint(null));
    this.#plot.addEventListener("blur", () => onpoint(null));
    this.#plot.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, Home: "first", End: "last" }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      onkey(move);
    });
    new ResizeObserver(() => this.#draw()).observe(this.#plot);
  }

  /** {x: [from, to], xShow, xTicks, y: [from, to], yShow, lines: [{name, kind, points: [[x, y]], dots}], floor: {y, name} | null,
   *  marks: [{y, name}]}; a mark is a thin line across, drawn where it lies inside */
  set(data) {
    this.#data = data;
    this.#draw(true);
  }

  /** Point at x in all lines, or at nothing; `spoken` is what a screen reader says about it. */
  point(x, spoken = "") {
    this.#cursor = x;
    this.#plot.setAttribute("aria-valuetext", spoken || "Arrow keys move along the curve");
    this.#point();
  }

  #draw(changed = false) {
    const width = this.#plot.clientWidth;
    if (!this.#data || width === 0 || (!changed && width === this.#size[0])) return;
    this.#size = [width, this.height];
    const { x, y, lines, floor, marks = [] } = this.#data;
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.#plot.setAttribute("aria-valuemin", x[0]);
    this.#plot.setAttribute("aria-valuemax", x[1]);
    this.#plot.setAttribute("aria-valuenow", this.#cursor ?? x[1]);
    const inside = shape("svg", { x: LEFT, y: 0, width: width - LEFT, height: this.height - BOTTOM + 4, class: "inside", viewBox: `${LEFT} 0 ${width - LEFT} ${this.height - BOTTOM + 4}` });
    for (const line of lines) inside.append(...this.#line(line));
    const seen = marks.filter((mark) => mark.y >= y[0] && mark.y <= y[1]);
    const parts = [...this.#grid(), ...seen.flatMap((mark) => this.#mark(mark)), ...(floor && floor.y >= y[0] && floor.y <= y[1] ? this.#floor(floor) : []), inside, this.#marks];
    this.#svg.replaceChildren(...parts);
    this.#point();
  }

  #grid() {
    const { x, y, xShow, xTicks, yShow } = this.#data, [width] = this.#size, bottom = this.height - BOTTOM;
    const values = ticks(...y, this.height > 150 ? 7 : 4), names = sameDigits(values.map(yShow));
    const rows = values.flatMap((value, index) => [
      shape("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: this.#y(value), y2: this.#y(value) }),
      text(LEFT - 8, this.#y(value) + 4, "end", names[index]),
    ]);
    const columns = xTicks(...x, Math.max(2, Math.floor((width - LEFT) / 110))).map((value) => text(this.#x(value), bottom + 18, "middle", xShow(value)));
    return [...rows, ...columns];
  }

  #floor({ y, name }) {
    const [width] = this.#size;
    return [
      shape("line", { class: "floor", x1: LEFT, x2: width - RIGHT, y1: this.#y(y), y2: this.#y(y) }),
      text(LEFT + 4, this.#y(y) + 13, "start", name, "floor-name"),
    ];
  }

  #mark({ y, name }) {
    const [width] = this.#size;
    return [
      shape("line", { class: "mark-line", x1: LEFT, x2: width - RIGHT, y1: this.#y(y), y2: this.#y(y) }),
      text(width - RIGHT - 4, this.#y(y) - 4, "end", name, "mark-name"),
    ];
  }

  #line({ kind, points, dots }) {
    const near = points.filter(([x]) => x >= this.#data.x[0]);
    const path = shape("path", { class: `line ${kind}`, d: this.#path(thin(near, this.#size[0] - LEFT - RIGHT)) });
    if (!dots || near.length > 80) return [path];
    return [path, ...near.map(([x, y]) => shape("circle", { class: `dot ${kind}`, cx: this.#x(x), cy: this.#y(y), r: 2.6 }))];
  }

  #path(points) {
    let pen = "M";
    return points.map(([x, y]) => {
      if (!Number.isFinite(y)) {
        pen = "M"; // a gap
        return "";
      }
      const part = `${pen}${this.#x(x).toFixed(1)} ${this.#y(y).toFixed(1)}`;
      pen = "L";
      return part;
    }).join("");
  }

  #point() {
    if (!this.#data) return;
    const { lines, yShow, x: [from, to] } = this.#data;
    const x = this.#cursor === null ? null : Math.max(from, Math.min(to, this.#cursor));
    const found = lines.map((line) => [line, nearest(line.points, x)]).filter(([, point]) => point);
    const marks = found.filter(([, [, y]]) => x !== null && this.#y(y) >= 0)
      .map(([{ kind }, [px, py]]) => shape("circle", { class: `mark ${kind}`, cx: this.#x(px), cy: this.#y(py), r: 4 }));
    const rule = x === null ? [] : [shape("line", { class: "rule", x1: this.#x(x), x2: this.#x(x), y1: TOP, y2: this.height - BOTTOM })];
    this.#marks.replaceChildren(...rule, ...marks);
    this.#readout.replaceChildren(...found.flatMap(([{ name, kind, show = yShow }, [, y]]) => [
      element("span", { class: `key ${kind}` }), element("span", { class: "key-name" }, `${name} `), element("b", {}, show(y)), " ",
    ]));
  }

  #x(value) {
    const { x: [from, to] } = this.#data;
    return LEFT + ((value - from) / (to - from || 1)) * (this.#size[0] - LEFT - RIGHT);
  }

  #y(value) {
    const { y: [from, to] } = this.#data;
    return this.height - BOTTOM - ((value - from) / (to - from || 1)) * (this.height - BOTTOM - TOP);
  }

  #valueAt(clientX) {
    const { left, width } = this.#plot.getBoundingClientRect(), { x: [from, to] } = this.#data;
    return from + Math.max(0, Math.min(1, (clientX - left - LEFT) / (width - LEFT - RIGHT))) * (to - from);
  }
}

/** Round numbers between two: about `count` of them. */
export function ticks(from, to, count, steps = null) {
  const raw = (to - from) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = (steps ?? [1, 2, 2.5, 5, 10].map((factor) => factor * power)).find((candidate) => candidate >= raw) ?? raw;
  const values = [];
  for (let value = Math.ceil(from / step - 1e-9) * step; value <= to + 1e-9 * step; value += step) values.push(Math.abs(value) < 1e-12 ? 0 : value);
  return values;
}

/** ["0.2", "0.25", "1 k"] -> ["0.20", "0.25", "1 k"] */
function sameDigits(names) {
  const digits = Math.max(...names.map((name) => /^\d+\.(\d+)$/.exec(name)?.[1].length ?? 0));
  return names.map((name) => (/^\d+(\.\d+)?$/.test(name) && Number(name) !== 0 ? Number(name).toFixed(digits) : name));
}

/** Not more points than pixels can show: of each pixel the least and the greatest, in their order. */
function thin(points, pixels) {
  if (points.length <= 2 * pixels) return points;
  const size = points.length / pixels, kept = [];
  for (let pixel = 0; pixel < pixels; pixel++) {
    const bucket = points.slice(Math.floor(pixel * size), Math.floor((pixel + 1) * size));
    const least = bucket.reduce((a, b) => (b[1] < a[1] ? b : a)), most = bucket.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(least === most ? [least] : [least, most].sort((a, b) => a[0] - b[0])));
  }
  return kept;
}

/** The point closest to x, the last one when x is null. */
function nearest(points, x) {
  const whole = points.filter(([, y]) => Number.isFinite(y));
  if (!whole.length || x === null) return whole.at(-1);
  return whole.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function text(x, y, anchor, content, kind = "tick") {
  const node = shape("text", { x, y, "text-anchor": anchor, class: kind });
  node.textContent = content;
  return node;
}
