// The page: what its buttons and fields do, and when the server is asked how it is.

import { apiKey, ask, chat, Failure, setApiKey } from "./api.js";
import { Conversation } from "./conversation.js";
import { Panel } from "./panel.js";

const SETTINGS = "pace_nb.settings";
const SAMPLING = ["temperature", "top_p", "max_tokens", "seed"];
const LOOK_EVERY = 2000; // ms between looks at the server

const byId = (id) => document.getElementById(id);
const conversation = new Conversation(byId("conversation"), byId("empty"), regenerate);
const panel = new Panel(byId);
const message = byId("message");
let running = null; // AbortController of the answer that comes
let modelName = null;
let keyRefused = false;
let leaving = false; // the page is being left: its requests fail, and that is no error

// ---- answers ----

function requestBody() {
  const body = {
    messages: conversation.forModel(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const system = byId("system").value.trim();
  if (system) body.messages.unshift({ role: "system", content: system });
  for (const name of SAMPLING) {
    const value = byId(name).value;
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

/** Have the last question answered. */
async function answer() {
  const body = requestBody();
  const made = conversation.add({ role: "assistant", content: "", unfinished: true });
  const clock = new Clock();
  running = new AbortController();
  arrange();
  try {
    for await (const { progress, chunk } of chat(body, running.signal)) {
      if (progress) made.progress = progress;
      else take(chunk, made, clock);
      conversation.changed(made);
    }
  } catch (error) {
    if (leaving) return;
    if (error.name === "AbortError") made.note = "Stopped.";
    else made.error = error instanceof Failure ? error.message : "The page failed. Load it again.";
    if (error.status === 401) wantKey(error.message);
    if (!(error instanceof Failure) && error.name !== "AbortError") console.error(error);
  }
  running = null;
  delete made.unfinished;
  delete made.progress;
  conversation.draw(made);
  conversation.save();
  arrange();
  byId("spoken").textContent = made.error ? "" : `Answer: ${made.content}`;
  message.focus({ preventScroll: true });
  look();
}

function take(chunk, made, clock) {
  const choice = chunk.choices[0];
  const { content, reasoning_content, reasoning } = choice?.delta ?? {};
  const thought = reasoning_content ?? reasoning;
  if (content || thought) clock.tick();
  made.content += content ?? "";
  if (thought) made.reasoning = (made.reasoning ?? "") + thought;
  if (choice?.finish_reason === "length") made.note = "Ended at the limit of tokens.";
  if (chunk.usage) clock.tokens = chunk.usage.completion_tokens;
  made.figures = clock.inWords();
}

/** Times of an answer, as this page sees them: the network is in them. */
class Clock {
  constructor() {
    this.tokens = 0;
    this._start = performance.now();
    this._first = this._last = null;
  }

  tick() {
    this._last = performance.now();
    this._first ??= this._last;
  }

  inWords() {
    if (this._first === null) return "";
    const words = [`${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`];
    const seconds = (this._last - this._first) / 1000;
    if (this.tokens > 1 && seconds > 0) {
      words.push(`${((this.tokens - 1) / seconds).toFixed(1)} tokens/s`);
    }
    words.push(`first after ${((this._first - this._start) / 1000).toFixed(2)} s`);
    return words.join(" · ");
  }
}

function send() {
  const text = message.value.trim();
  if (!text || running || !settingsAreValid()) return;
  conversation.add({ role: "user", content: text });
  message.value = "";
  fit();
  answer();
}

function regenerate() {
  if (running || !settingsAreValid()) return;
  conversation.removeLast();
  answer();
}

function settingsAreValid() {
  const form = byId("settings");
  if (!form.checkValidity()) showSide(true);
  return form.reportValidity();
}

// ---- the server ----

async function look() {
  try {
    const state = await readiness();
    setState(...state);
    if (keyRefused) return;
    if (modelName === null && state[0] === "ready") await readModel();
    panel.show(await (await ask("metrics")).text(), performance.now());
  } catch (error) {
    panel.clear();
    if (error.status === 401) wantKey(error.message);
    else setState("down", error.status ? "not answering" : "not reachable");
  }
}

/** [kind, words]; health needs no key, and says 503 in an answer of its own kind. */
async function readiness() {
  const response = await fetch("health", { cache: "no-store" }).catch(() => null);
  if (response === null) throw new Failure("", 0);
  if (response.ok) return ["ready", "ready"];
  const found = await response.json().catch(() => null);
  return ["wait", (found?.error?.message ?? "not ready").toLowerCase()];
}

async function readModel() {
  const [model] = (await (await ask("v1/models")).json()).data;
  modelName = model.id;
  byId("model").textContent = byId("model").title = model.id;
  document.title = `${model.id} · pace_nb`;
  byId("context-row").hidden = model.max_model_len === null;
  byId("context").textContent = String(model.max_model_len);
}

function setState(kind, words) {
  const state = byId("state");
  state.dataset.state = kind;
  if (state.textContent !== words) state.textContent = words;
}

function wantKey(words) {
  keyRefused = true;
  byId("key-form").hidden = false;
  if (apiKey()) {
    byId("key-note").textContent = words;
    byId("key-note").classList.add("refused");
  }
  byId("key").focus();
}

async function useKey() {
  setApiKey(byId("key").value.trim());
  keyRefused = false;
  modelName = null;
  await look();
  byId("key-form").hidden = !keyRefused;
  byId("change-key").hidden = !apiKey() || keyRefused;
  if (!keyRefused) message.focus();
}

// ---- the page itself ----

function arrange() {
  const busy = running !== null;
  conversation.setBusy(busy);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("new-chat").disabled = busy;
}

/** The message field is as high as its text, up to what the style allows. */
function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function showSide(shown) {
  byId("side").classList.toggle("shown", shown);
  byId("toggle-side").setAttribute("aria-expanded", String(shown));
}

function loadSettings() {
  let found;
  try {
    found = JSON.parse(sessionStorage.getItem(SETTINGS)) ?? {};
  } catch {
    found = {};
  }
  for (const name of [...SAMPLING, "system"]) byId(name).value = found[name] ?? "";
}

function saveSettings() {
  const values = [...SAMPLING, "system"].map((name) => [name, byId(name).value]);
  sessionStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(values)));
}

function on(id, event, action) {
  byId(id).addEventListener(event, action);
}

on("composer", "submit", (event) => {
  event.preventDefault();
  send();
});
on("key-form", "submit", (event) => {
  event.preventDefault();
  useKey();
});
on("settings", "submit", (event) => event.preventDefault());
on("settings", "input", saveSettings);
on("stop", "click", () => running?.abort());
on("new-chat", "click", () => {
  conversation.clear();
  message.focus();
});
on("toggle-side", "click", () => showSide(!byId("side").classList.contains("shown")));
on("change-key", "click", () => {
  byId("key-form").hidden = false;
  byId("key").select();
  showSide(false);
});
on("message", "input", fit);
on("message", "keydown", (event) => {
  const typed = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (typed && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
addEventListener("beforeunload", () => (leaving = true));
addEventListener("pagehide", () => conversation.save());
addEventListener("pageshow", ({ persisted }) => {
  leaving = false;
  if (persisted && running) location.reload(); // it came back, its answer did not
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) look();
});

loadSettings();
conversation.load();
byId("change-key").hidden = !apiKey();
look();
setInterval(() => {
  if (!document.hidden) look();
}, LOOK_EVERY);
