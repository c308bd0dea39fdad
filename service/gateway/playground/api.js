// Calls to the server: requests with an API key if one is required, readable errors, and job events.

const KEY = "patchforge-api-key";
export const TERMINAL = new Set(["completed", "failed", "cancelled", "expired"]);
const RETRY_MS = [500, 1000, 2000, 5000];

let apiKey = recall();
let askForKey = async () => null;
let asking = null; // one dialog for all waiting requests

// An error response, with the server's own message. `field` is the field that is not valid, or null.
export class Refusal extends Error {
  constructor(status, { detail, error, field, code }, retryAfter = null) {
    const text = detail ?? error?.message ?? `the server answered with status ${status}`;
    super(retryAfter ? `${text} (retry in ${retryAfter} s)` : text);
    this.status = status;
    this.field = field ?? error?.param ?? null;
    this.code = code ?? error?.code ?? null;
  }
}

// No answer at all. The message is for the user.
export class Unreachable extends Error {
  constructor() { super("The server does not answer. Is it running? Nothing was lost: try again."); }
}

// `ask(message)` is called when a key is required. It resolves to the key, or to null if the user cancels.
export function onKeyNeeded(ask) { askForKey = ask; }

async function send(path, { headers, ...options } = {}) {
  for (;;) {
    const used = apiKey;
    const key = used ? { Authorization: `Bearer ${used}` } : {};
    const reply = await fetch(path, { ...options, headers: { ...headers, ...key } })
      .catch((error) => { throw error instanceof TypeError ? new Unreachable() : error; });
    if (reply.ok) return reply;
    const refusal = new Refusal(reply.status, await reply.json().catch(() => ({})), reply.headers.get("Retry-After"));
    if (reply.status !== 401) throw refusal;
    if (used !== apiKey) continue; // another request got a key meanwhile
    asking ??= askForKey(refusal.message).finally(() => { asking = null; });
    const given = await asking;
    if (!given) throw refusal;
    remember(given);
  }
}

const json = async (path, options) => (await send(path, options)).json();

export const models = async () => (await json("v1/models")).data.map(({ patchforge }) => patchforge);
export const server = () => json("playground/server.json");
export const schemas = async () => (await json("openapi.json")).components.schemas;
export const cancel = (id, options) => json(`v1/jobs/${id}`, { method: "DELETE", ...options });
export const picture = async (id, index) => (await send(`v1/jobs/${id}/image?index=${index}`)).blob();
export const submit = (request) =>
  json("v1/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request) });

// Yields every event of a job until it ends, as {type, ...}. After a broken connection it yields
// {type: "reconnecting"} and resumes after the last event. EventSource does the same but cannot send a key.
export async function* events(id) {
  let last = "";
  for (let failures = 0; ; failures += 1) {
    try {
      const reply = await send(`v1/jobs/${id}/events`, { headers: last ? { "Last-Event-ID": last } : {} });
      if (reply.status === 204) return; // it has ended
      for await (const { id: place, data } of frames(reply.body)) {
        [last, failures] = [place, 0];
        const event = JSON.parse(data);
        yield event;
        if (TERMINAL.has(event.type)) return;
      }
    } catch (error) { // errors of the server are final; errors of the network, and 503, are not
      if (error instanceof Refusal && error.status !== 503) throw error;
    }
    yield { type: "reconnecting" };
    await new Promise((go) => { setTimeout(go, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]); });
  }
}

async function* frames(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).replaceAll("\r\n", "\n").split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: ?(.*)/s, 2)));
      if (fields.data) yield fields;
    }
  }
}

function recall() {
  try { return sessionStorage.getItem(KEY); } catch { return null; }
}

function remember(key) {
  apiKey = key;
  try { sessionStorage.setItem(KEY, key); } catch { /* storage is off: the page asks again after a reload */ }
}
