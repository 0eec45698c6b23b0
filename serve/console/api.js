// The server's routes, asked with the reader's key.

const KEY = "deltamux.key";
// Longer than any answer to a poll takes; what takes longer is a server that hangs.
const WAIT_MS = 10_000;
// Loading an expert reads it from disk.
export const LONG_MS = 600_000;
const MOST_LETTERS = 600;

// Behind a proxy the server may have a prefix: routes are beside the page.
const root = new URL(".", document.baseURI);

// What a server answered instead of what was asked; status 0: it did not answer.
class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get isAway() {
    return this.status === 0 || this.status >= 502;
  }
}

export function key() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// The words of an error body: OpenAI's, FastAPI's, or whatever came.
function said(body) {
  try {
    const { error, detail, message } = JSON.parse(body);
    const found = error?.message ?? error ?? detail ?? message;
    if (Array.isArray(found)) return found.map((each) => each.msg ?? String(each)).join("; ");
    return typeof found === "string" ? found : "";
  } catch {
    return body;
  }
}

// One sentence for people.
function inWords(status, body, retryAfter) {
  const message = said(body).trim().slice(0, MOST_LETTERS);
  if (status === 401) return "The server does not take this key.";
  if (status === 403) {
    return `This key does not allow it: ${message || "the server gives no reason"} (403). Use an administrator's key.`;
  }
  if (status === 429) {
    const when = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    return `Too many requests: ${message || "the server limits this key"} (429).${when}`;
  }
  return message || `The server answered with status ${status} and no reason.`;
}

async function refusal(response) {
  const body = await response.text().catch(() => "");
  const retry = response.headers.get("retry-after");
  return new ServerError(response.status, inWords(response.status, body, retry));
}

async function send(method, path, body, signal) {
  const headers = {};
  if (key()) headers.authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const content = body === undefined ? undefined : JSON.stringify(body);
  try {
    return await fetch(new URL(path, root), { method, headers, body: content, signal, cache: "no-store" });
  } catch (error) {
    throw unreachable(error);
  }
}

function unreachable(error) {
  if (error.name === "AbortError") return error;
  const late = error.name === "TimeoutError";
  return new ServerError(0, late ? "The server did not answer in time." : "The server cannot be reached.");
}

async function answer(method, path, body, wait) {
  const response = await send(method, path, body, AbortSignal.timeout(wait));
  if (!response.ok) throw await refusal(response);
  try {
    return await response.text();
  } catch (error) {
    throw unreachable(error);
  }
}

// The JSON of a route. Throws ServerError.
export async function ask(method, path, body, wait = WAIT_MS) {
  const content = await answer(method, path, body, wait);
  try {
    return JSON.parse(content);
  } catch {
    throw new ServerError(500, `The answer of ${path} is not JSON.`);
  }
}

export function page(path) {
  return answer("GET", path, undefined, WAIT_MS);
}

// Readiness is told by 503 too: its reasons are wanted, not an error.
export async function readiness() {
  const response = await send("GET", "v1/ready", undefined, AbortSignal.timeout(WAIT_MS));
  if (response.status !== 503 && !response.ok) throw await refusal(response);
  return response.json().catch(() => ({ ready: response.ok, reasons: [] }));
}

// The events of a streamed answer. `onHead` gets the response's headers before the first of them.
export async function* stream(path, body, signal, onHead) {
  const response = await send("POST", path, body, signal);
  if (!response.ok) throw await refusal(response);
  onHead(response.headers);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : broken();
    });
    if (done) throw broken();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.code ?? 500, said(data));
      yield event;
    }
  }
}

function broken() {
  return new ServerError(0, "The connection broke before the answer had ended.");
}
