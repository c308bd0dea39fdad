// The playground: sends the form's requests as runs, shows them on the stage and keeps them in the gallery.

import * as api from "./api.js";
import { Code } from "./code.js";
import { verdict } from "./compare.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { History } from "./history.js";
import { fromHash, toHash } from "./link.js";
import { Run } from "./run.js";
import { Stage } from "./stage.js";

const $ = (id) => document.getElementById(id);
const ENDS = {
  completed: "Done", failed: "Failed", cancelled: "Cancelled", expired: "Expired", lost: "Connection lost",
};
const WAIT_MS = 2000; // between checks for a worker
const STACKED = "(max-width: 56rem)"; // where the stage is below the form
const SHOWN = "patchforge-shown"; // in session storage: the gallery's entry that is on the stage

const stage = new Stage($("stage"));
const code = new Code();
let form = null;
let gallery = null;
let running = []; // the runs in flight

async function start() {
  api.onKeyNeeded(askForKey);
  let [schemas, cards] = [];
  try {
    [schemas, cards] = await loadModels();
  } catch { // the user gave no key: the page shows the reason, and a reload asks again
    say("");
    return;
  }
  code.server = await api.server().catch(() => code.server);
  form = new Form($("form"), schemas, cards);
  form.source.addEventListener("change", () => { if (!form.source.size) stage.painting = false; });
  form.source.addEventListener("paint", paint);
  form.source.addEventListener("settings", ({ detail }) => restore(detail));
  await readLink();
  $("form").inert = false;
  say("");
  await openGallery();
}

// Loads the schemas and the models. Retries while the server is away or has no worker.
async function loadModels() {
  for (;;) {
    let reason = "No worker is ready: its models may still be loading. This page goes on by itself.";
    try {
      const [schemas, cards] = await Promise.all([api.schemas(), api.models()]);
      complain("");
      if (cards.length > 0) return [schemas, cards];
    } catch (error) {
      reason = "The server does not answer. This page goes on by itself once it does.";
      if (error instanceof api.Refusal) reason = error.message;
      complain(reason);
      if (error.status === 401) throw error;
    }
    say("Waiting for a worker…");
    $("empty").textContent = reason;
    await new Promise((go) => { setTimeout(go, WAIT_MS); });
    $("empty").textContent = "Your picture will appear here, patch by patch.";
  }
}

async function openGallery() {
  try {
    const history = await History.open();
    gallery = new Gallery($("shelf"), history, recall);
    await gallery.refresh();
    const entry = await history.get(sessionStorage.getItem(SHOWN) ?? "");
    if (entry && running.length === 0) await present(entry); // the page was loaded again
  } catch { // perhaps a private window; everything else works
    $("no-history").hidden = false;
  }
}

async function generate() {
  form.forgiveAll();
  complain("");
  busy(true);
  const card = form.card;
  const { requests, source } = await form.requests();
  const runs = [];
  for (const [which, request] of requests.entries()) {
    try {
      runs.push(await Run.submit(card, request, source));
    } catch (error) {
      form.refuse(error, which);
      await cancel(runs).catch(() => null); // a comparison needs both
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
  stage.painting = false;
  stage.show(runs, titles);
  $("empty").hidden = true;
  $("verdict").textContent = "";
  code.show(runs);
}

async function conclude(runs, titles) {
  const failed = runs.find(({ error }) => error);
  if (failed) complain(failed.error.message);
  if (runs.some(({ report }) => report?.prompt_truncated)) {
    complain("The prompt is too long for this model. Its end was ignored.");
  } else if (runs.some(({ report }) => report?.negative_prompt_truncated)) {
    complain("The negative prompt is too long for this model. Its end was ignored.");
  }
  $("verdict").textContent = await verdict(runs, titles);
  say(ENDS[worstState(runs)]);
  if (!gallery || runs.some(({ state }) => state !== "completed")) return;
  try {
    remember(await gallery.history.add(titles, runs.map((run) => run.record())));
  } catch { // the browser's storage is full, or was taken away
    $("no-history").hidden = false;
  }
  await gallery.refresh();
}

const worstState = (runs) => (runs.find(({ state }) => state !== "completed") ?? runs[0]).state;

// Shows an entry of the gallery, and fills the form with its requests.
async function recall(entry) {
  if (running.length > 0) return; // the stage keeps showing the running jobs
  form.forgiveAll();
  const { runs } = entry;
  await form.fill(runs.map(({ request }) => request), runs[0].source);
  writeLink();
  await present(entry);
  remember(entry.key);
  say("Loaded from the gallery");
  $("stage").scrollIntoView({ block: "nearest" });
}

async function present({ runs: records, titles }) {
  const runs = records.map((record) => Run.restore(record));
  show(runs, titles);
  $("verdict").textContent = await verdict(runs, titles);
}

function remember(key) {
  try { sessionStorage.setItem(SHOWN, key); } catch { /* storage is off: a reload begins with an empty stage */ }
}

// Fills the form with the settings that a picture's file has.
async function restore(settings) {
  form.forgiveAll();
  await form.fill([settings]);
  writeLink();
  const known = !settings.model || form.cards.has(settings.model);
  complain(known ? "" : `This server has no model named ${settings.model}: the picture will differ.`);
  say("Settings restored from the picture");
}

function paint() {
  stage.painting = true;
  complain("");
  if (running.length === 0) say("");
  if (matchMedia(STACKED).matches) $("stage").scrollIntoView();
  else $("editor").scrollIntoView({ block: "nearest" });
}

async function edit(picture) {
  await form.source.take(picture);
  paint();
  $("mask").focus({ preventScroll: true });
}

// The address always says what is in the form: it can be bookmarked or sent, and a reload brings the form back.
function writeLink() { history.replaceState(null, "", `#${toHash(form.draft())}`); }

async function readLink() {
  const requests = fromHash(location.hash);
  if (requests) await form.fill(requests);
}

function lost(run, error) {
  run.state = "lost";
  complain(error.message);
}

// Screen readers announce milestones only: reading every preview aloud would never end.
function announce({ detail: event, target: run }) {
  if (event.type === "reconnecting") {
    say("Reconnecting…");
    complain("The connection to the server broke. Trying again: your picture goes on without it.");
    return;
  }
  if ($("status").textContent === "Reconnecting…") {
    say("Drawing…");
    complain("");
  }
  if (event.type === "queued") say("Waiting for a worker…");
  else if (event.type === "started") say(event.attempt > 1 ? `Drawing (attempt ${event.attempt})…` : "Drawing…");
  else if (event.type === "failed") run.error = event.error;
}

const cancel = (runs, options) => Promise.all(runs.map((run) => run.cancel(options)));

function busy(yes) {
  for (const button of document.querySelectorAll('[type="submit"].primary')) button.disabled = yes;
  $("cancel").disabled = !yes;
  $("stage").setAttribute("aria-busy", String(yes));
}

function say(words) { $("status").textContent = words; }

// Shows an error where it is seen wherever the page is scrolled to; "" takes it away.
function complain(words) { $("problem").textContent = words; }

async function shareLink() {
  writeLink();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied");
  } catch { // without clipboard access, as on http from another machine
    say("The link is in the address bar");
  }
}

function askForKey(message) {
  code.key = true;
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
$("form").addEventListener("change", writeLink);
$("form").addEventListener("input", ({ target }) => {
  if (!target.matches('select, [type="checkbox"], [type="radio"]')) writeLink(); // those change more fields by `change`
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("generate").disabled) $("form").requestSubmit();
});
$("cancel").addEventListener("click", () => cancel(running).catch((error) => form.refuse(error)));
addEventListener("keydown", ({ key }) => { if (key === "Escape" && running.length > 0) $("cancel").click(); });
addEventListener("hashchange", () => { if (form) readLink(); });
$("easel").addEventListener("edit", ({ detail }) => edit(detail));
$("paint-done").addEventListener("click", () => { stage.painting = false; });
$("dismiss").addEventListener("click", () => complain(""));
$("share").addEventListener("click", shareLink);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the part after # says what is in the form
  $("stage").focus();
});
addEventListener("pagehide", () => cancel(running, { keepalive: true }));

start();
