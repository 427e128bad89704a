// Conversation with a model that knows turns.

import { stream } from "./api.js";
import { announce, byId, element } from "./dom.js";
import { run } from "./run.js";
import { chosenSettings, seedOf } from "./settings.js";

const messages = []; // {role, content}
let controller = null;

export function startChat() {
  byId("send").addEventListener("click", () => (controller ? stopChat() : send()));
  byId("chat-new").addEventListener("click", () => {
    stopChat();
    messages.length = 0;
    byId("messages").replaceChildren();
    showState();
    byId("message").focus();
  });
  showState();
}

export async function send() {
  const text = byId("message").value.trim();
  if (!text || controller) return;
  byId("message").value = "";
  messages.push({ role: "user", content: text });
  bubble(messages.at(-1));
  const answer = { role: "assistant", content: "" };
  const shown = bubble(answer);
  const own = (controller = new AbortController());
  showState();
  trouble("");
  try {
    const body = { model: run.info?.name ?? "", messages: [...messages], seed: seedOf(byId("seed")), ...chosenSettings() };
    for await (const event of stream("v1/chat/completions", body, own.signal, (s) => trouble(`All places are taken. Trying again in ${Math.ceil(s)} s …`))) {
      trouble("");
      answer.content += event.choices?.[0]?.delta?.content ?? "";
      shown.textContent = answer.content;
      shown.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    if (error.name !== "AbortError") trouble(error.message);
  }
  if (answer.content) messages.push(answer);
  else shown.parentElement.remove();
  announce(answer.content);
  if (own === controller) controller = null;
  showState();
}

export function stopChat() {
  if (!controller) return false;
  controller.abort();
  controller = null;
  showState();
  return true;
}

function bubble({ role, content }) {
  const text = element("p", { class: "tale", dir: "auto" }, content);
  byId("messages").append(element("li", { class: `message ${role}` }, element("span", { class: "unseen" }, role === "user" ? "You: " : "Model: "), text));
  return text;
}

function showState() {
  byId("send").textContent = controller ? "Stop" : "Send";
  byId("send").classList.toggle("stopping", controller !== null);
  byId("chat-new").hidden = messages.length === 0;
}

function trouble(text) {
  byId("chat-trouble").hidden = !text;
  byId("chat-trouble").textContent = text;
}
