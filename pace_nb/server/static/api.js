// The server's HTTP: requests with the key, errors in words, the events of a stream.
// Knows nothing of what is on the page.

const KEY = "pace_nb.key";

/** What went wrong, in words for a person. `status` is HTTP's, 0 where there was no answer. */
export class Failure extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";

export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** A response that is OK. Throws Failure, or AbortError where `signal` says so. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  throw new Failure(inWords(response.status, found?.error?.message ?? ""), response.status);
}

function inWords(status, message) {
  const said = message ? `${message[0].toUpperCase()}${message.slice(1)}.` : "";
  switch (status) {
    case 401:
      return apiKey() ? "The server does not accept this API key." : "The server asks for an API key.";
    case 403:
      return `The server refuses this page. ${said}`;
    case 413:
      return "The conversation is too long for the server. Start a new chat.";
    case 429:
      return `The server has enough requests of yours. ${said} Try again in a moment.`;
    case 503:
      return `The server cannot take this now. ${said} Try again in a moment.`;
    default:
      return said || `The server answered with status ${status} and no explanation.`;
  }
}

/**
 * The events of a chat completion: `{progress: [computed, total]}` for the comments that come while
 * the prompt is read, `{chunk}` for everything else. Throws Failure, also where the server ends a
 * stream with an error or does not end it.
 */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", { body, signal });
  try {
    for await (const line of lines(response.body)) {
      const progress = /^: keepalive (\d+)\/(\d+)$/.exec(line);
      if (progress) yield { progress: [Number(progress[1]), Number(progress[2])] };
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(inWords(chunk.error.code, chunk.error.message), 0);
      yield { chunk };
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
  }
  throw new Failure("The connection ended before the answer did.", 0);
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield part.replace(/\r$/, "");
  }
}
