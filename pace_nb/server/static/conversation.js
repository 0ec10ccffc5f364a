// The conversation: its messages, how they look, and that they survive a reload of the tab.
// A message is {role, content} and, for answers, reasoning, figures, note, error, unfinished.

import { element, write } from "./prose.js";

const STORE = "pace_nb.conversation";
const SAVE_EVERY = 500; // ms, while an answer comes
const NEAR_END = 80; // px: who has scrolled up further is not pulled down again

export class Conversation {
  constructor(parent, empty, onRegenerate) {
    this.messages = [];
    this._parent = parent;
    this._empty = empty;
    this._views = new Map();
    this._onRegenerate = onRegenerate;
    this._drawing = false;
    this._saved = 0;
    this._busy = false;
  }

  load() {
    try {
      this.messages = JSON.parse(sessionStorage.getItem(STORE)) ?? [];
    } catch {
      this.messages = [];
    }
    for (const message of this.messages) {
      if (message.unfinished) {
        delete message.unfinished;
        message.note = "Ended when the page was loaded again.";
      }
      this._show(message);
    }
    this._arrange();
    this._parent.scrollTop = this._parent.scrollHeight;
  }

  save() {
    this._saved = performance.now();
    try {
      sessionStorage.setItem(STORE, JSON.stringify(this.messages));
    } catch {
      // The store is full: the conversation goes on, it just will not survive a reload.
    }
  }

  clear() {
    this.messages = [];
    for (const view of this._views.values()) view.root.remove();
    this._views.clear();
    this._arrange();
    this.save();
  }

  add(message) {
    this.messages.push(message);
    this._show(message);
    this._arrange();
    this._parent.scrollTop = this._parent.scrollHeight;
    this.save();
    return message;
  }

  removeLast() {
    const message = this.messages.pop();
    this._views.get(message).root.remove();
    this._views.delete(message);
    this._arrange();
  }

  /** What the model is sent. A question without an answer goes with it, so that roles alternate,
   * as many chat templates demand. */
  forModel() {
    const sent = [];
    for (const [i, { role, content }] of this.messages.entries()) {
      const next = this.messages[i + 1];
      if (role === "user" && (!next || next.content)) sent.push({ role, content });
      if (role === "assistant" && content) sent.push({ role, content });
    }
    return sent;
  }

  setBusy(busy) {
    this._busy = busy;
    this._arrange();
  }

  /** A message has changed: draw it at the browser's next frame. */
  changed(message) {
    if (message.unfinished && performance.now() - this._saved > SAVE_EVERY) this.save();
    if (this._drawing) return;
    this._drawing = true;
    requestAnimationFrame(() => {
      this._drawing = false;
      this.draw(message);
    });
  }

  draw(message) {
    const view = this._views.get(message);
    if (!view) return;
    const { scrollHeight, scrollTop, clientHeight } = this._parent;
    const atEnd = scrollHeight - scrollTop - clientHeight < NEAR_END;
    if (message.role === "user") view.text.textContent = message.content;
    else write(view.text, message.content);
    view.root.setAttribute("aria-busy", String(Boolean(message.unfinished)));
    view.reasoning.hidden = !message.reasoning;
    view.thoughts.textContent = message.reasoning ?? "";
    const waits = Boolean(message.unfinished && !message.content && !message.reasoning);
    const [computed, total] = message.progress ?? [0, 0];
    view.prefill.hidden = !waits;
    view.prefillText.textContent = total
      ? `Reading the prompt: ${computed} of ${total} tokens`
      : "Waiting for the first token";
    if (total) {
      view.prefillBar.max = total;
      view.prefillBar.value = computed;
    } else view.prefillBar.removeAttribute("value");
    view.figures.textContent = message.figures ?? "";
    view.note.textContent = message.note ?? "";
    view.note.hidden = !message.note;
    view.error.textContent = message.error ?? "";
    view.error.hidden = !message.error;
    if (atEnd) this._parent.scrollTop = this._parent.scrollHeight;
  }

  _show(message) {
    const mine = message.role === "user";
    const view = {
      text: element("div", [], "text"),
      thoughts: element("div", [], "thoughts"),
      prefillText: element("span"),
      prefillBar: element("progress"),
      figures: element("span", [], "figures"),
      note: element("p", [], "note"),
      error: element("p", [], "error"),
      regenerate: element("button", ["Regenerate"], "regenerate"),
      copy: element("button", ["Copy"], "copy"),
    };
    view.error.setAttribute("role", "alert");
    view.prefillBar.setAttribute("aria-label", "Prompt read");
    view.prefill = element("p", [view.prefillText, view.prefillBar], "prefill");
    view.reasoning = element("details", [element("summary", ["Reasoning"]), view.thoughts]);
    view.regenerate.type = view.copy.type = "button";
    view.regenerate.addEventListener("click", () => this._onRegenerate());
    view.copy.addEventListener("click", async () => {
      const done = await navigator.clipboard?.writeText(message.content).then(() => true, () => false);
      view.copy.textContent = done ? "Copied" : "Cannot copy here";
      setTimeout(() => (view.copy.textContent = "Copy"), 1500);
    });
    view.foot = element("div", [view.figures, view.copy, view.regenerate], "foot");
    view.root = element(
      "article",
      mine
        ? [element("h2", ["You"]), view.text]
        : [
            element("h2", ["Answer"]), view.reasoning, view.prefill, view.text, view.note,
            view.error, view.foot,
          ],
      `message ${message.role}`,
    );
    this._views.set(message, view);
    this._parent.append(view.root);
    this.draw(message);
  }

  /** Buttons belong to answers that are complete; only the last can be made again. */
  _arrange() {
    this._empty.hidden = this.messages.length > 0;
    const last = this.messages.at(-1);
    for (const [message, view] of this._views) {
      const idle = !(this._busy && message === last);
      view.copy.hidden = !message.content || !idle;
      view.regenerate.hidden = message !== last || this._busy;
    }
  }
}
