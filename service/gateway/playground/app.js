// The playground: the form's requests become runs, the stage shows them, history keeps them.

import * as api from "./api.js";
import { verdict } from "./compare.js";
import { Form } from "./form.js";
import { History, Shelf } from "./history.js";
import { Run } from "./run.js";
import * as snippets from "./snippets.js";
import { Stage } from "./stage.js";

const $ = (id) => document.getElementById(id);
const ENDS = {
  completed: "Done", failed: "Failed", cancelled: "Cancelled", expired: "Expired", lost: "Connection lost",
};
const WAIT_MS = 2000; // between looks for a worker
const STACKED = "(max-width: 56rem)"; // where the stage is below the form

const stage = new Stage($("stage"));
let form = null;
let shelf = null;
let running = []; // the runs in flight
let keyNeeded = false;
let server = { grpc_port: null };

async function start() {
  api.onKeyNeeded(askForKey);
  let [schemas, cards] = [];
  try {
    [schemas, cards] = await known();
  } catch { // no key was given: the reason is on the page, and a reload asks again
    say("");
    return;
  }
  server = await api.server().catch(() => server);
  form = new Form($("form"), schemas, cards);
  $("form").inert = false;
  say("");
  try {
    const history = await History.open();
    shelf = new Shelf($("shelf"), history, recall);
    await shelf.refresh();
  } catch { // a private window, perhaps: everything else works
    $("no-history").hidden = false;
  }
}

// The schemas and the models; a server that is away or has no worker yet is tried again.
async function known() {
  for (;;) {
    try {
      const [schemas, cards] = await Promise.all([api.schemas(), api.models()]);
      $("problem").textContent = "";
      if (cards.length > 0) return [schemas, cards];
    } catch (error) {
      if (error instanceof api.Refusal) $("problem").textContent = error.message;
      if (error.status === 401) throw error;
    }
    say("Waiting for a worker…");
    await new Promise((go) => { setTimeout(go, WAIT_MS); });
  }
}

async function generate() {
  form.forgiveAll();
  busy(true);
  const card = form.card;
  const { requests, source } = await form.requests();
  const runs = [];
  for (const [which, request] of requests.entries()) {
    try {
      runs.push(await Run.submit(card, request, source));
    } catch (error) {
      form.refuse(error, which);
      await cancel(runs); // a comparison needs both
      say("");
      busy(false);
      return;
    }
  }
  running = runs;
  const titles = form.titles(runs);
  show(runs, titles);
  if (matchMedia(STACKED).matches) $("stage").scrollIntoView();
  for (const run of runs) run.addEventListener("change", announce);
  await Promise.all(runs.map((run) => run.follow().catch((error) => lost(run, error))));
  running = [];
  busy(false);
  await conclude(runs, titles);
}

function show(runs, titles) {
  stage.show(runs, titles);
  $("empty").hidden = true;
  $("verdict").textContent = "";
  $("snippets").hidden = false;
  showSnippet();
  showFiles();
}

async function conclude(runs, titles) {
  const failed = runs.find(({ error }) => error);
  if (failed) $("problem").textContent = failed.error.message;
  if (runs.some(({ report }) => report?.prompt_truncated)) {
    $("problem").textContent = "The prompt was longer than the model reads; its end was ignored.";
  }
  $("verdict").textContent = await verdict(runs, titles);
  say(ENDS[worst(runs)]);
  if (!shelf || runs.some(({ state }) => state !== "completed")) return;
  await shelf.history.add(titles, runs.map((run) => run.record())).catch(() => { $("no-history").hidden = false; });
  await shelf.refresh();
}

const worst = (runs) => (runs.find(({ state }) => state !== "completed") ?? runs[0]).state;

async function recall({ runs: records, titles }) {
  if (running.length > 0) return; // what is being drawn stays on the stage
  const runs = records.map((record) => Run.restore(record));
  form.forgiveAll();
  await form.fill(runs.map(({ request }) => request), runs[0].source);
  show(runs, titles);
  say("From history");
  $("verdict").textContent = await verdict(runs, titles);
}

function lost(run, error) {
  run.state = "lost";
  $("problem").textContent = error.message;
}

// Said aloud at milestones only: a voice reading every preview would never end.
function announce({ detail: event, target: run }) {
  if (event.type === "reconnecting") say("Reconnecting…");
  else if (event.type === "queued") say("Waiting for a worker…");
  else if (event.type === "started") say(event.attempt > 1 ? `Drawing (attempt ${event.attempt})…` : "Drawing…");
  else if (event.type === "failed") run.error = event.error;
  else if (event.type === "preview" && $("status").textContent === "Reconnecting…") say("Drawing…");
}

const cancel = (runs, options) => Promise.all(runs.map((run) => run.cancel(options)));

function busy(yes) {
  $("generate").disabled = yes;
  $("cancel").disabled = !yes;
  $("stage").setAttribute("aria-busy", String(yes));
}

function say(words) { $("status").textContent = words; }

function showSnippet() {
  const kind = document.querySelector('[name="snippet"]:checked').value;
  const at = {
    http: location.origin + location.pathname.replace(/\/$/, ""),
    grpc: `${location.hostname}:${server.grpc_port ?? 50051}`,
    secure: location.protocol === "https:",
    key: keyNeeded,
  };
  $("code").textContent = stage.runs.map(({ request }) => snippets[kind](request, at)).join("\n");
}

// The files that a snippet reads, to be saved beside it.
function showFiles() {
  const source = stage.runs[0].source;
  $("files").hidden = !source;
  for (const link of $("files").querySelectorAll("a")) URL.revokeObjectURL(link.href);
  if (!source) return;
  const [image, mask] = $("files").querySelectorAll("a");
  image.href = URL.createObjectURL(source.image);
  mask.parentElement.hidden = !source.mask;
  if (source.mask) mask.href = URL.createObjectURL(source.mask);
}

async function edit(picture) {
  await form.source.take(picture);
  $("mask").focus();
}

async function copy() {
  getSelection().selectAllChildren($("code")); // for a page without a clipboard: Ctrl-C does it then
  try {
    await navigator.clipboard.writeText($("code").textContent);
    $("copied").textContent = "Copied";
  } catch {
    $("copied").textContent = "Selected: press Ctrl-C";
  }
}

function askForKey(message) {
  keyNeeded = true;
  $("key-reason").textContent = message;
  $("key").value = "";
  $("key-dialog").returnValue = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    const answer = () => resolve($("key-dialog").returnValue === "use" ? $("key").value : null);
    $("key-dialog").addEventListener("close", answer, { once: true });
  });
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("generate").disabled) $("form").requestSubmit();
});
$("cancel").addEventListener("click", () => cancel(running).catch((error) => form.refuse(error)));
addEventListener("keydown", ({ key }) => { if (key === "Escape" && running.length > 0) $("cancel").click(); });
$("easel").addEventListener("edit", ({ detail }) => edit(detail));
$("snippets").addEventListener("change", () => { $("copied").textContent = ""; showSnippet(); });
$("copy").addEventListener("click", copy);
addEventListener("pagehide", () => cancel(running, { keepalive: true }));

start();
