// The page: its header, its three views, its keys.

import { send, startChat, stopChat } from "./chat.js";
import { compareNow, showCheckpoints, startCheckpoints, stopAll } from "./checkpoints.js";
import { announce, byId, whole } from "./dom.js";
import { run } from "./run.js";
import { startSettings } from "./settings.js";
import { leaveStory, startStory, stopNow, tellNow } from "./story.js";
import { showTraining, startTraining } from "./training.js";

const VIEWS = ["story", "training", "checkpoints"];
let view = "story";

startSettings();
startStory();
startChat();
startTraining();
startCheckpoints();
startTabs();
document.addEventListener("keydown", keys);
run.addEventListener("change", header);
run.addEventListener("newer", newer);
run.addEventListener("reach", banner);
byId("banner-key").addEventListener("click", () => run.poll({ ask: true }));
await run.start();

// ── header ──

function header() {
  const { name, step, training, has_turns: turns } = run.info;
  document.title = `${name} · SmallLM`;
  byId("run-name").textContent = name;
  byId("dot").classList.toggle("training", training);
  byId("activity").textContent = training ? "training" : "idle";
  byId("step").textContent = step == null ? "no checkpoint yet" : `step ${whole(step)}`;
  byId("tab-story").textContent = turns ? "Chat" : "Story";
  byId("story-view").hidden = Boolean(turns);
  byId("chat-view").hidden = !turns;
}

/** A newer checkpoint came; the next story is told by it. */
function newer() {
  const text = `now step ${whole(run.info.step)}`;
  byId("step").textContent = text;
  byId("step").classList.remove("fresh");
  requestAnimationFrame(() => byId("step").classList.add("fresh"));
  announce(text);
}

function banner() {
  byId("banner").hidden = run.reachable && !run.locked;
  byId("banner-key").hidden = !run.locked;
  byId("banner-text").textContent = run.locked
    ? "This server asks for a key."
    : "The server does not answer. This page tries again every two seconds; nothing is lost.";
  if (!run.reachable) {
    byId("activity").textContent = "away";
    byId("dot").classList.remove("training");
  } else if (run.info) header();
}

// ── views ──

function startTabs() {
  for (const name of VIEWS) {
    byId(`tab-${name}`).addEventListener("click", () => open(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      const at = VIEWS.indexOf(name);
      const to = { ArrowRight: at + 1, ArrowLeft: at + VIEWS.length - 1, Home: 0, End: VIEWS.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(VIEWS[to % VIEWS.length]);
      byId(`tab-${view}`).focus();
    });
  }
  addEventListener("hashchange", follow);
  follow();
}

/** The address remembers the view: #training */
function follow() {
  const name = location.hash.slice(1);
  if (VIEWS.includes(name)) open(name);
}

function open(name) {
  view = name;
  for (const other of VIEWS) {
    const chosen = other === name;
    byId(`tab-${other}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${other}`).tabIndex = chosen ? 0 : -1;
    byId(`panel-${other}`).hidden = !chosen;
  }
  if (location.hash.slice(1) !== name && (location.hash || name !== "story")) history.replaceState(null, "", `#${name}`);
  leaveStory();
  run.watched = name !== "story";
  if (run.watched && run.info) run.poll();
  showTraining();
  showCheckpoints();
}

// ── keys ──

function keys(event) {
  if (byId("key-dialog").open) return;
  const chat = Boolean(run.info?.has_turns);
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    const act = { story: chat ? send : tellNow, training: () => false, checkpoints: compareNow }[view];
    if (act() !== false) event.preventDefault();
  } else if (event.key === "Escape") {
    const act = { story: () => stopNow() || stopChat(), training: () => false, checkpoints: stopAll }[view];
    if (act()) event.preventDefault();
  }
}
