// Telling stories: a beginning, the text that the model adds to it, and the branches one gets by choosing other pieces.
//
// A telling is {prompt, tokens, seed, parent, branch, finish}: the whole text is the prompt and its tokens. A branch
// holds a copy of the tokens up to where it leaves its parent, so each telling stands for itself.

import { Alternatives, visible } from "./alternatives.js";
import { announce, byId, element, whole } from "./dom.js";
import { run } from "./run.js";
import { chosenSettings, seedOf } from "./settings.js";
import { Pace, tokensOf } from "./tale.js";

const BEGINNINGS = ["Once upon a time", "One day, a little rabbit", "It was raining, and", "“Look!” said", "Deep in the forest"];
const MOST_TELLINGS = 40;
const SURE = [0.9, 0.6, 0.3, 0.1]; // limits of the tints

const tellings = [];
let current = null; // the telling that is shown; null while one writes
let controller = null; // of the telling that streams
let pace = null;
let spoken = ""; // what screen readers have not heard yet

const tale = byId("tale"), prompt = byId("prompt");
const alternatives = new Alternatives((span, piece, probability) => branch(Number(span.dataset.index), piece, probability));

export const textOf = ({ prompt, tokens }) => prompt + tokens.map((token) => token.text).join("");

export function startStory() {
  byId("tell").addEventListener("click", () => (controller ? stop() : tell()));
  byId("continue").addEventListener("click", () => goOn(current));
  byId("edit").addEventListener("click", () => write(textOf(current)));
  byId("copy").addEventListener("click", copy);
  byId("new").addEventListener("click", () => write(""));
  byId("certainty").addEventListener("change", showCertainty);
  prompt.addEventListener("input", grow);
  addEventListener("resize", grow);
  listen();
  run.addEventListener("samples", beginnings);
  run.addEventListener("newer", figures);
  beginnings();
  showState();
  grow();
}

/** Ctrl+Enter; says whether there was something to do. */
export function tellNow() {
  if (controller) return false;
  tell();
  return true;
}
/** Another view is opened; a text that streams goes on. */
export function leaveStory() {
  alternatives.close();
}
/** Esc: close the window of alternatives, else stop; says whether there was something to do. */
export function stopNow() {
  if (alternatives.open) alternatives.close({ refocus: byId("alternatives").contains(document.activeElement) });
  else if (controller) stop();
  else return false;
  return true;
}

// ── telling ──

function tell() {
  const telling = { prompt: current ? current.prompt : prompt.value, tokens: [], parent: null, branch: null };
  add(telling);
  goOn(telling);
}

/** The text up to a token, then another piece instead of it; the story goes on from there. */
function branch(index, piece, probability) {
  stop();
  const old = current.tokens[index];
  const tokens = [...current.tokens.slice(0, index), { ...old, text: piece, piece, probability, mine: true }];
  const telling = { prompt: current.prompt, tokens, parent: current, branch: { from: old.piece, to: piece } };
  if (piece === "") telling.finish = "stop";
  add(telling);
  show(telling);
  reach(tale.querySelector(`[data-index="${index}"]`))?.focus({ preventScroll: true });
  if (piece !== "") goOn(telling);
}

function add(telling) {
  telling.number = (tellings.at(-1)?.number ?? 0) + 1;
  tellings.push(telling);
  if (tellings.length > MOST_TELLINGS) tellings.shift();
}

/** Let the model add to a telling. */
async function goOn(telling) {
  stop();
  const own = (controller = new AbortController());
  telling.seed = seedOf(byId("seed"));
  telling.finish = null;
  telling.shortened = false;
  telling.step = run.info?.step ?? null;
  pace = new Pace();
  trouble("");
  if (current !== telling) show(telling);
  showState();
  announce("Telling");
  try {
    const body = { model: run.info?.name ?? "", prompt: textOf(telling), seed: telling.seed, ...chosenSettings() };
    for await (const { tokens, finish, shortened } of tokensOf(body, own.signal, waiting)) {
      if (own !== controller) return;
      telling.shortened ||= shortened;
      trouble("");
      append(telling, tokens);
      telling.finish = finish ?? telling.finish;
    }
  } catch (error) {
    if (error.name !== "AbortError") trouble(error.message);
  }
  if (own !== controller) return;
  controller = null;
  speak(true);
  showState();
}

function stop() {
  if (!controller) return;
  controller.abort();
  controller = null;
  showState();
}

const waiting = (seconds) => trouble(`All places are taken. Trying again in ${Math.ceil(seconds)} s …`);

function append(telling, tokens) {
  if (!tokens.length) return;
  const follow = atEnd();
  pace.add(tokens.length);
  tale.append(...tokens.flatMap((token, index) => nodes(token, telling.tokens.length + index)));
  telling.tokens.push(...tokens);
  if (!tale.querySelector("[tabindex='0']")) reach(tale.querySelector(".token"));
  spoken += tokens.map((token) => token.text).join("");
  speak(false);
  figures();
  if (follow) scrollTo({ top: document.documentElement.scrollHeight });
}

/** Whether the end of the text is what the reader looks at. */
function atEnd() {
  const end = tale.getBoundingClientRect().bottom;
  return end > innerHeight * 0.5 && document.documentElement.scrollHeight - innerHeight - scrollY < 120;
}

/** Screen readers hear whole sentences. */
function speak(everything) {
  const end = everything ? spoken.length : (spoken.match(/^[^]*[.!?]["”’]?\s/)?.[0].length ?? 0);
  if (end === 0) return;
  announce(spoken.slice(0, end));
  spoken = spoken.slice(end);
}

// ── what is seen ──

/** Show a telling as text whose pieces can be asked. */
function show(telling) {
  current = telling;
  alternatives.close();
  tale.replaceChildren(element("span", { class: "prompt" }, telling.prompt), ...telling.tokens.flatMap(nodes));
  reach(tale.querySelector(".token"));
  showState();
}

/** Back to writing, with a beginning. */
function write(text) {
  stop();
  current = null;
  alternatives.close();
  trouble("");
  prompt.value = text;
  showState();
  grow();
  prompt.focus();
  prompt.setSelectionRange(text.length, text.length);
}

/** Everything that depends on whether one writes, the model tells, or a telling is finished. */
function showState() {
  const telling = controller !== null, reading = current !== null, resting = reading && !telling;
  byId("writing").hidden = reading;
  tale.hidden = !reading;
  tale.classList.toggle("telling", telling);
  byId("tell").textContent = telling ? "Stop" : reading ? "Tell another" : "Tell";
  byId("tell").title = telling ? "Esc" : "Ctrl + Enter";
  byId("tell").classList.toggle("stopping", telling);
  byId("tell-hint").hidden = reading;
  byId("continue").hidden = !resting || current.finish === "stop";
  for (const id of ["edit", "copy", "new"]) byId(id).hidden = !resting;
  byId("certainty-switch").hidden = !reading;
  byId("legend").hidden = !reading || !byId("certainty").checked;
  byId("ending").hidden = !resting || current.finish !== "stop";
  byId("ending").textContent = "The end";
  branches();
  figures();
}

function trouble(text) {
  byId("trouble").hidden = !text;
  byId("trouble").textContent = text;
}

function figures() {
  const line = byId("figures");
  line.hidden = !current || !pace;
  if (line.hidden) return;
  const { tokens, seed, step, shortened } = current;
  const parts = [`${whole(tokens.length)} pieces`, pace.speed, pace.firstToken, shortened && "the model read only the end of the text, more does not fit"].filter(Boolean);
  const again = element("button", { class: "link", id: "seed-used", title: "Put this seed into the settings, to tell the same story again" }, `seed ${seed}`);
  again.addEventListener("click", () => {
    byId("seed").value = String(seed);
    byId("settings-fold").open = true;
    announce(`Seed ${seed} is set`);
  });
  const newer = step !== null && run.info?.step > step ? [` · told by step ${whole(step)}; step ${whole(run.info.step)} has come since`] : [];
  line.replaceChildren(parts.join(" · "), " · ", again, ...newer);
}

/** A piece as a span, the space before its word beside it: tints and marks look right at the ends of lines. */
function nodes(token, index) {
  if (token.text === "") return []; // part of a character that a later token completes
  const [space] = token.text.match(/^\s+(?=\S)/) ?? [""];
  const span = element("span", { class: `token sure-${certainty(token.probability)}${token.mine ? " mine" : ""}` }, token.text.slice(space.length));
  span.dataset.index = index;
  return space ? [space, span] : [span];
}

/** 0 (more than 90 %) to 4 (less than 10 %) */
function certainty(probability) {
  const level = SURE.findIndex((limit) => probability >= limit);
  return level < 0 ? SURE.length : level;
}

function showCertainty() {
  tale.classList.toggle("certainty", byId("certainty").checked);
  showState();
}

/** The textarea is as high as its text. */
function grow() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function beginnings() {
  const own = run.samples.map(({ prompt }) => prompt).filter(Boolean); // what the run itself was asked while it trained
  const texts = [...new Set([...own, ...BEGINNINGS])].slice(0, BEGINNINGS.length);
  byId("beginnings").replaceChildren(...texts.map((text) => element("button", {
    class: "chip", onclick: () => {
      prompt.value = text;
      grow();
      prompt.focus();
    } }, text)));
}

/** The tellings as a tree: each one below the one it left, deeper by one. */
function branches() {
  byId("branches").hidden = tellings.length < 2;
  const rows = [];
  const place = (parent, depth) => {
    for (const telling of tellings) {
      const above = tellings.includes(telling.parent) ? telling.parent : null;
      if (above !== parent) continue;
      rows.push(branchRow(telling, depth));
      place(telling, depth + 1);
    }
  };
  place(null, 0);
  byId("branch-list").replaceChildren(...rows);
}

function branchRow(telling, depth) {
  const label = telling.branch
    ? [element("span", {}, element("q", {}, visible(telling.branch.to)), " instead of ", element("q", {}, visible(telling.branch.from)))]
    : [element("span", { class: "excerpt" }, excerpt(telling))];
  const button = element("button", { class: "branch", onclick: () => {
    stop();
    pace = null;
    show(telling);
  } }, element("span", { class: "number" }, String(telling.number)), ...label);
  if (telling === current) button.setAttribute("aria-current", "true");
  button.style.marginInlineStart = `${Math.min(depth, 6) * 1.4}rem`;
  return element("li", {}, button);
}

/** How a telling goes on behind its beginning. */
function excerpt(telling) {
  const text = textOf(telling).trim().replace(/\s+/g, " ");
  return text.length > 64 ? `${text.slice(0, 64).replace(/\s\S*$/, "")} …` : text || "An empty beginning";
}

async function copy() {
  const text = textOf(current);
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not a secure page (http from another machine)
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

// ── pointing at pieces ──

function listen() {
  const asked = (target) => {
    const node = target.closest?.(".token");
    return node ? [node, current.tokens[Number(node.dataset.index)]] : [null, null];
  };
  tale.addEventListener("click", (event) => {
    const [node, token] = asked(event.target);
    if (!node || !getSelection().isCollapsed) return; // text is being selected
    reach(node);
    alternatives.pin(node, token, false);
  });
  tale.addEventListener("pointerover", (event) => {
    const [node, token] = asked(event.target);
    if (node && event.pointerType === "mouse" && event.buttons === 0) alternatives.hover(node, token);
  });
  tale.addEventListener("pointerleave", () => alternatives.leave());
  tale.addEventListener("keydown", (event) => {
    const [node, token] = asked(event.target);
    if (!node || event.ctrlKey || event.metaKey || event.altKey) return;
    const to = { ArrowRight: node.nextElementSibling, ArrowLeft: node.previousElementSibling, Home: tale.querySelector(".token"), End: tale.lastElementChild };
    if (event.key === "Enter" || event.key === " " || event.key === "ArrowDown") alternatives.pin(node, token, true);
    else if (to[event.key]?.classList.contains("token")) reach(to[event.key]).focus();
    else if (!(event.key in to)) return;
    event.preventDefault();
  });
}

/** Of all pieces, one is in the tab order: the last one that was visited. */
function reach(node) {
  if (!node) return null;
  for (const other of tale.querySelectorAll("[tabindex]")) {
    other.removeAttribute("tabindex");
    other.removeAttribute("role");
    other.removeAttribute("aria-haspopup");
  }
  node.tabIndex = 0;
  node.setAttribute("role", "button");
  node.setAttribute("aria-haspopup", "dialog");
  return node;
}
