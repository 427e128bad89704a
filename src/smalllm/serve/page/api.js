// Requests to the server this page came from: JSON, streams of events, the key.

import { byId, store, stored } from "./dom.js";

/** The server answered with an error; `message` is a sentence for people. */
export class ServerError extends Error {
  constructor(message, status, { code = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code; // a word for programs
    this.retryAfter = retryAfter; // seconds
  }
}
/** No answer at all. */
export class Unreachable extends Error {}

const KEY = "smalllm.key";
const PATIENCE_MS = 10_000;
const BUSY_TRIES = 5;

/** GET a JSON object. Only with `ask` may a dialog for the key open. */
export async function get(path, { ask = false } = {}) {
  const response = await send(path, { signal: AbortSignal.timeout(PATIENCE_MS) }, ask);
  try {
    return await response.json();
  } catch {
    throw new Unreachable("the answer broke off");
  }
}

/** POST JSON and yield the events of the answer. A busy server (503) is asked again when it says so; `waiting(s)` hears of it. */
export async function* stream(path, body, signal, waiting = () => {}) {
  const request = {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...body, stream: true }), signal,
  };
  for (let tries = 1; ; tries++) {
    try {
      yield* events(await send(path, request, true));
      return;
    } catch (error) {
      if (error.status !== 503 || error.retryAfter === null || tries >= BUSY_TRIES) throw error;
      waiting(error.retryAfter);
      await pause(1000 * Math.min(error.retryAfter, 30), signal);
    }
  }
}

/** The JSON objects of a server-sent event stream, however it is cut; ends at [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new Unreachable("The server stopped in the middle of the text.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection open, blank lines end an event
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message, 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable("The connection broke off.");
  }
}

async function send(path, options, ask) {
  for (;;) {
    const key = stored("sessionStorage", KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await reach(path, { ...options, headers });
    if (response.status === 401 && ask) {
      store("sessionStorage", KEY, await askForKey(key !== null));
      if (options.signal?.aborted || options.method === undefined) options = { ...options, signal: AbortSignal.timeout(PATIENCE_MS) };
      continue;
    }
    if (!response.ok) throw await failure(response);
    return response;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("The server does not answer.");
  }
}

async function failure(response) {
  const wait = Number.parseFloat(response.headers.get("Retry-After"));
  let message = `The server answered ${response.status} ${response.statusText}`.trim(), code = null;
  try {
    const { error } = await response.json();
    [message, code] = [String(error.message), error.code];
  } catch { /* not JSON: the status must do */ }
  return new ServerError(message, response.status, { code, retryAfter: Number.isFinite(wait) ? wait : null });
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    }, { once: true });
  });
}

// ── the key ──

let asking = null;

/** One dialog, however many requests wait for it; ServerError 401 when it is dismissed. */
function askForKey(wrong) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = byId("key-dialog"), field = byId("key");
    byId("key-text").textContent = wrong
      ? "That key was not accepted. Please try again."
      : "It was started with --api-key. The key stays in this browser tab.";
    field.value = "";
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      if (field.value.trim()) dialog.close("given");
    };
    byId("key-cancel").onclick = () => dialog.close("");
    dialog.onclose = () => {
      asking = null;
      const given = dialog.returnValue === "given";
      dialog.returnValue = "";
      if (given) resolve(field.value.trim());
      else reject(new ServerError("This server asks for a key.", 401));
    };
    dialog.showModal();
  });
  return asking;
}
