// The small window beside a piece of text: what else could have come there, and how likely it was.

import { byId, element, percent } from "./dom.js";

const REST_MS = 300; // a pointer that only passes by opens nothing

/** A piece as people can read it: line ends become visible, and a piece that is nothing but spaces too. */
export function visible(piece) {
  if (piece === "") return "The end";
  return piece.replaceAll("\n", "⏎").replaceAll("\t", "⇥").trim() || "␣".repeat(piece.length);
}

export class Alternatives {
  #box = byId("alternatives");
  #anchor = null; // the span it belongs to
  #pinned = false;
  #timer = 0;
  #choose;

  /** `choose(span, piece)` is called when another piece is chosen. */
  constructor(choose) {
    this.#choose = choose;
    this.#box.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    this.#box.addEventListener("pointerleave", () => this.leave());
    this.#box.addEventListener("keydown", (event) => this.#key(event));
    document.addEventListener("pointerdown", (event) => {
      if (!this.#box.contains(event.target) && event.target !== this.#anchor) this.close();
    });
    addEventListener("resize", () => this.close());
  }

  get open() {
    return !this.#box.hidden;
  }

  /** A pointer rests on a piece. */
  hover(span, token) {
    clearTimeout(this.#timer);
    if (!this.#pinned && span !== this.#anchor) this.#timer = setTimeout(() => this.#show(span, token), REST_MS);
    if (!this.#pinned && this.open && span === this.#anchor) clearTimeout(this.#timer);
  }

  /** The pointer went away: close, unless it comes back at once or the window was opened by a click. */
  leave() {
    clearTimeout(this.#timer);
    if (!this.#pinned) this.#timer = setTimeout(() => this.close(), REST_MS);
  }

  /** Opened by a click or by Enter: it stays. With `focus`, arrow keys are at once among the alternatives. */
  pin(span, token, focus) {
    clearTimeout(this.#timer);
    if (this.#pinned && span === this.#anchor) return this.close();
    this.#show(span, token);
    this.#pinned = true;
    if (focus) (this.#box.querySelector("[aria-current]") ?? this.#box.querySelector("button"))?.focus();
  }

  close({ refocus = false } = {}) {
    clearTimeout(this.#timer);
    this.#box.hidden = true;
    this.#pinned = false;
    this.#anchor?.classList.remove("open");
    if (refocus) this.#anchor?.focus();
    this.#anchor = null;
  }

  #show(span, token) {
    this.#anchor?.classList.remove("open");
    this.#anchor = span;
    span.classList.add("open");
    this.#pinned = false;
    this.#box.replaceChildren(...this.#content(token));
    this.#box.hidden = false;
    this.#place(span);
  }

  #content(token) {
    const rows = [...token.top];
    if (!rows.some(([piece]) => piece === token.piece)) rows.push([token.piece, token.probability]);
    const greatest = Math.max(...rows.map(([, probability]) => probability), 1e-9);
    const others = 1 - rows.reduce((sum, [, probability]) => sum + probability, 0);
    const list = rows.map(([piece, probability]) => this.#row(piece, probability, probability / greatest, token));
    const rest = others > 0.0005 ? [element("p", { class: "others" }, `all others ${percent(others)}`)] : [];
    return [element("p", { class: "heading" }, "What could have come here"), ...list, ...rest];
  }

  #row(piece, probability, share, token) {
    const chosen = piece === token.piece;
    const broken = !chosen && piece.includes("\ufffd"); // part of a character: no text can hold it
    const bar = element("span", { class: "bar-fill" });
    bar.style.width = `${100 * share}%`;
    const row = element("button", { class: "alternative", disabled: broken },
      element("span", { class: "piece", dir: "auto" }, element("span", { class: "blank" }, piece.trim() && piece.startsWith(" ") ? "·" : ""), visible(piece)),
      element("span", { class: "bar-track" }, bar),
      element("span", { class: "chance" }, percent(probability)));
    row.setAttribute("aria-label", `${visible(piece)}, ${percent(probability)}${chosen ? ", in the text now" : ""}`);
    if (chosen) row.setAttribute("aria-current", "true");
    row.addEventListener("click", () => {
      const span = this.#anchor;
      this.close({ refocus: chosen });
      if (!chosen) this.#choose(span, piece, probability);
    });
    return row;
  }

  /** Below the piece, above it when there is no room; never outside the window. Narrow windows: a sheet (style.css). */
  #place(span) {
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = this.#box.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left - 12, document.documentElement.clientWidth - width - 8));
    const below = at.bottom + 6, above = at.top - height - 6;
    const top = below + height > innerHeight - 8 && above > 8 ? above : below;
    this.#box.style.left = `${left + scrollX}px`;
    this.#box.style.top = `${top + scrollY}px`;
  }

  #key(event) {
    const rows = [...this.#box.querySelectorAll("button:not(:disabled)")];
    const at = rows.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      rows[Math.max(0, Math.min(to, rows.length - 1))].focus();
    } else if (event.key === "Tab") {
      this.close({ refocus: true });
    }
  }
}
