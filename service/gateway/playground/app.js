// The playground: one form, POST /v1/jobs, then the job's event stream drawn as it comes.

const $ = (id) => document.getElementById(id);

const range = (label, min, max, step, value) => ({ label, type: "range", min, max, step, value });
const EASY = range("Share of easy patches", 0, 1, 0.05, 0.4);
const SAMPLERS = { // what each does, and its knobs
  euler: ["Every patch, one uniform step at a time.", {}],
  dual_loop: ["Easy patches take whole steps, hard ones several small ones.", {
    quantile: EASY,
    inner_steps: range("Inner steps", 1, 16, 1, 4),
    exact: { label: "Evaluate easy patches too (exact)", type: "checkbox" },
  }],
  look_ahead: ["Hard patches see the easy ones moved ahead, as cleaner context.", {
    quantile: EASY,
    ratio: range("How far ahead", 1, 4, 0.1, 1.4),
  }],
  multistep: ["All patches together, of second order: 8 to 12 steps are plenty.", {
    exponent: range("Finer near noise", 0.5, 3, 0.1, 1.5),
  }],
};
const LIVE_LEGEND = "Tinted tiles are still being worked on; clear ones have finished.";
const FINAL_LEGEND = "Point at a picture to see when each patch finished: clear early, strongly tinted late.";

const models = new Map();
let current = null; // the job on show: {id, card, pictures, events, began}

// ---- the form

async function loadModels() {
  try {
    const { data } = await call("v1/models");
    for (const { id, patchforge } of data) models.set(id, patchforge);
    complain("");
  } catch (error) { // a server that is away is tried again in silence; one that refuses has a reason
    if (!(error instanceof TypeError)) complain(error.message);
  }
  if (models.size === 0) {
    say("Waiting for a worker…");
    setTimeout(loadModels, 2000);
    return;
  }
  $("model").replaceChildren(...[...models.keys()].map((name) => new Option(name)));
  const text = [...models.values()].find((card) => card.kind === "text");
  if (text) $("model").value = text.name;
  say("");
  showModel();
}

function showModel() {
  const card = models.get($("model").value);
  const byClass = card.kind === "class";
  $("class-row").hidden = !byClass;
  $("prompt-row").hidden = byClass;
  $("class").required = byClass;
  $("prompt").required = !byClass;
  $("classes").replaceChildren(...card.classes.map((name) => new Option(name)));
  $("about").textContent = `${card.width} × ${card.height} pixels in ${card.grid[0] * card.grid[1]} patches. ${card.description}`;
  $("steps").value = card.steps;
  $("guidance").value = card.guidance;
  $("sampler").value = card.sampler.name;
  showKnobs(card.sampler);
}

function showKnobs(values = {}) {
  const [about, knobs] = SAMPLERS[$("sampler").value];
  $("about-sampler").textContent = about;
  const rows = Object.entries(knobs).map(([name, knob]) => row(name, knob, values[name] ?? knob.value));
  $("knobs").replaceChildren($("knobs").firstElementChild, ...rows);
}

function row(name, { label, ...attributes }, value) {
  const made = document.createElement("label");
  const input = Object.assign(document.createElement("input"), attributes, { name });
  if (input.type === "checkbox") {
    made.className = "check";
    input.checked = value ?? false;
    made.append(input, label);
    return made;
  }
  const shown = document.createElement("output");
  const show = () => { shown.textContent = input.value; };
  input.addEventListener("input", show);
  input.value = value;
  show();
  const caption = document.createElement("span");
  caption.append(label, shown);
  made.append(caption, input);
  return made;
}

function request() {
  const sampler = { name: $("sampler").value };
  for (const input of $("knobs").querySelectorAll("input")) {
    sampler[input.name] = input.type === "checkbox" ? input.checked : Number(input.value);
  }
  const body = {
    model: $("model").value,
    sampler,
    steps: Number($("steps").value),
    guidance: Number($("guidance").value),
    n: Number($("n").value),
  };
  if (models.get(body.model).kind === "class") body.class_label = $("class").value;
  else body.prompt = $("prompt").value;
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  return body;
}

// ---- one job

async function generate() {
  current = null;
  complain("");
  busy(true);
  try {
    watch(await call("v1/jobs", { method: "POST", body: JSON.stringify(request()) }));
  } catch (error) {
    complain(error.message);
    end("");
  }
}

function watch(job) {
  const card = models.get(job.request.model);
  const pictures = Array.from({ length: job.request.n }, () => picture(card));
  const events = new EventSource(`v1/jobs/${job.id}/events`);
  current = { id: job.id, card, pictures, events, began: performance.now() };
  $("gallery").replaceChildren(...pictures.map(({ figure }) => figure));
  $("progress").value = 0;
  $("legend").textContent = LIVE_LEGEND;
  const seed = job.request.seed;
  $("seeds").textContent = `Seed ${seed}${job.request.n > 1 ? ` to ${seed + job.request.n - 1}` : ""}`;
  figures(0, 0);

  const on = (type, act) => events.addEventListener(type, ({ data }) => act(JSON.parse(data)));
  on("queued", () => say("Waiting for a worker…"));
  on("started", ({ attempt }) => say(attempt > 1 ? `Drawing (attempt ${attempt})…` : "Drawing…"));
  on("preview", showPreview);
  on("image", ({ index }) => showFinal(job.id, pictures[index], index, job.request));
  on("completed", ({ report }) => showReport(report));
  on("failed", ({ error }) => { complain(error.message); end("Failed"); });
  on("cancelled", () => end("Cancelled"));
  on("expired", () => end("Expired"));
  events.addEventListener("error", () => { // the browser reconnects by itself, unless the server refused
    if (events.readyState === EventSource.CLOSED) end("Connection lost");
    else say("Reconnecting…");
  });
}

function picture(card) {
  const figure = Object.assign(document.createElement("figure"), { tabIndex: 0 });
  const [image, tiles] = [0, 1].map(() => document.createElement("canvas"));
  tiles.className = "tiles";
  [image.width, image.height] = [card.width, card.height];
  [tiles.height, tiles.width] = card.grid; // one pixel a patch, scaled up crisply
  image.setAttribute("role", "img");
  image.setAttribute("aria-label", "The picture");
  figure.append(image, tiles);
  return { figure, image, tiles, preview: null };
}

async function showPreview(event) {
  const shown = current.pictures[event.index];
  shown.preview = event;
  const seen = current.pictures.map(({ preview }) => preview).filter(Boolean);
  const sum = (field) => seen.reduce((total, preview) => total + preview[field], 0);
  $("progress").value = sum("evaluation") / event.evaluations / current.pictures.length;
  figures(sum("patch_evaluations"), sum("dense_patch_evaluations"));
  tint(shown.tiles, event.times.map((t) => 1 - t));
  await draw(shown, `data:image/png;base64,${event.b64_png}`, () => shown.preview === event);
}

async function showFinal(id, shown, index, { output_format }) {
  const url = `v1/jobs/${id}/image?index=${index}`;
  await draw(shown, url);
  const link = Object.assign(document.createElement("a"), { href: url, textContent: "Save" });
  link.download = `patchforge-${id}-${index}.${output_format}`;
  shown.figure.append(link);
}

function showReport(report) {
  report.images.forEach(({ finished_at }, index) => {
    const [first, last] = [Math.min(...finished_at), Math.max(...finished_at)];
    const { figure, tiles } = current.pictures[index];
    tint(tiles, finished_at.map((at) => (at - first) / (last - first || 1)));
    figure.classList.add("done");
  });
  $("legend").textContent = FINAL_LEGEND;
  figures(report.patch_evaluations, report.dense_patch_evaluations, report.duration_seconds);
  if (report.prompt_truncated) complain("The prompt was longer than the model reads; its end was ignored.");
  end("Done", 1);
}

async function draw({ image, figure }, src, wanted = () => true) {
  const source = Object.assign(new Image(), { src });
  await source.decode();
  if (wanted() && figure.isConnected) image.getContext("2d").drawImage(source, 0, 0, image.width, image.height);
}

function tint(canvas, strengths) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  strengths.forEach((strength, index) => {
    context.fillStyle = `rgb(98 70 234 / ${0.6 * strength})`;
    context.fillRect(index % canvas.width, Math.floor(index / canvas.width), 1, 1);
  });
}

function figures(done, dense, seconds = (performance.now() - current.began) / 1000) {
  const show = (id, words) => { $(id).textContent = dense ? words() : "–"; };
  show("saved", () => `${Math.round(100 * (1 - done / dense))} %`);
  show("done", () => done.toLocaleString());
  show("dense", () => dense.toLocaleString());
  show("time", () => `${seconds.toFixed(1)} s`);
}

function end(words, progress = 0) {
  current?.events.close();
  busy(false);
  say(words);
  $("progress").value = progress;
}

async function call(path, options = {}) {
  const reply = await fetch(path, { headers: { "Content-Type": "application/json" }, ...options });
  const body = await reply.json();
  if (!reply.ok) {
    const words = body.detail ?? body.error?.message ?? reply.statusText;
    throw new Error(body.field ? `${body.field}: ${words}` : words);
  }
  return body;
}

function busy(yes) {
  $("generate").disabled = yes;
  $("cancel").disabled = !yes;
}

const say = (words) => { $("status").textContent = words; };
const complain = (words) => { $("problem").textContent = words; };
const cancel = (options) => current && call(`v1/jobs/${current.id}`, { method: "DELETE", ...options });

$("form").addEventListener("submit", (event) => { event.preventDefault(); generate(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!$("generate").disabled) $("form").requestSubmit();
});
$("model").addEventListener("change", showModel);
$("sampler").addEventListener("change", () => showKnobs());
$("cancel").addEventListener("click", () => cancel().catch((error) => complain(error.message)));
addEventListener("pagehide", () => { if ($("generate").disabled) cancel({ keepalive: true }); });

loadModels();
