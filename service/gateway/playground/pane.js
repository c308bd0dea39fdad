// A pane shows one run on the stage: its pictures, savings and times.

import { PatchCanvas } from "./canvas.js";
import { enlarged, LARGE, nameOf, save } from "./files.js";
import { agree } from "./knobs.js";
import { finishedShare } from "./run.js";

const WORDS = {
  waiting: "Waiting for a worker…",
  running: "Drawing…",
  completed: "Done",
  failed: "Failed",
  cancelled: "Cancelled",
  expired: "Expired: no worker was free in time",
};

export class Pane {
  constructor(run, title) {
    this.run = run;
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.canvases = run.pictures.map(() => new PatchCanvas(run));
    this.figures = this.canvases.map((canvas, index) => this.#figure(canvas, index));
    this.#part("title").textContent = title;
    this.#part("settings").textContent = settings(run.request, run.card);
    const gallery = this.#part("pictures");
    gallery.replaceChildren(...this.figures);
    gallery.dataset.count = this.figures.length > 4 ? "many" : this.figures.length > 1 ? "some" : "one";
    this.update();
  }

  get length() { return Math.max(0, ...this.run.pictures.map(({ frames }) => frames.length)); }

  set options(options) { for (const canvas of this.canvases) canvas.options = options; }

  // The first and the last evaluation after which a patch finished, as far as it is known.
  get span() {
    const frames = this.run.pictures.map((picture) => picture.frames.at(-1)).filter(Boolean);
    const finished = frames.flatMap((frame) => frame.finishedAt.filter(Boolean));
    return [Math.min(...finished), Math.max(...finished)];
  }

  // Shows the frames at `share`, 0 to 1, of the run so far.
  scrub(share, how) {
    return Promise.all(this.run.pictures.map(({ frames }, index) => {
      const frame = frames[Math.round(share * (frames.length - 1))];
      if (!frame) return null;
      this.#describe(index, frame);
      return this.canvases[index].show(frame, how);
    }));
  }

  update() {
    const { run } = this;
    const { done, dense } = run.work;
    this.#part("state").textContent = WORDS[run.state];
    this.#part("saved").textContent = dense ? `${Math.round(100 * (1 - done / dense))} %` : "–";
    this.#part("done").textContent = dense ? `${done.toLocaleString()} of ${dense.toLocaleString()}` : "–";
    this.#part("bar").style.width = dense ? `${100 * (1 - done / dense)}%` : "0"; // the same share as the figure
    this.#part("progress").value = run.progress;
    this.#part("time").textContent = run.report || !run.ended ? seconds(run.seconds) : "–";
    this.#part("queue").textContent = run.report ? seconds(run.report.queue_seconds) : "–";
    this.#part("first").textContent = seconds(run.report?.time_to_first_preview_seconds);
    this.#part("lowered").hidden = run.report?.lowered_by !== "load";
    this.element.dataset.state = run.state;
    run.pictures.forEach(({ final }, index) => this.#offer(final, index));
  }

  #part(name) { return this.element.querySelector(`[data-part="${name}"]`); }

  #figure(canvas, index) {
    const figure = document.createElement("figure");
    canvas.element.tabIndex = 0;
    canvas.element.setAttribute("role", "img");
    canvas.element.setAttribute("aria-label", `Picture ${index + 1}, not started`);
    figure.append(canvas.element);
    return figure;
  }

  #describe(index, frame) {
    const { prompt, class_label: label } = this.run.request;
    const words = `Picture ${index + 1} of ${this.run.request.n}, ${prompt ?? label}`;
    const state = `${Math.round(100 * finishedShare(frame))} % of its patches are finished`;
    this.canvases[index].element.setAttribute("aria-label", `${words}: ${state}`);
  }

  #offer(final, index) {
    const figure = this.figures[index];
    if (!final || figure.querySelector(".offers")) return;
    const name = nameOf(this.run.request, index);
    const link = Object.assign(document.createElement("a"), {
      href: URL.createObjectURL(final), textContent: "Save", download: name,
    });
    link.setAttribute("aria-label", `Save picture ${index + 1}`);
    const large = this.#button("Save large", `Save picture ${index + 1} in ${LARGE} pixels`);
    large.addEventListener("click", async () => {
      save(await enlarged(final, this.canvases[index].options), name.replace(/\.\w+$/, `-${LARGE}.png`));
    });
    const edit = this.#button("Edit", `Edit picture ${index + 1}`);
    edit.addEventListener("click", () => edit.dispatchEvent(new CustomEvent("edit", { detail: final, bubbles: true })));
    const offers = Object.assign(document.createElement("div"), { className: "offers" });
    offers.append(edit, link, large);
    figure.append(offers);
  }

  #button(textContent, label) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent });
    button.setAttribute("aria-label", label);
    return button;
  }

  // Removes the pane and frees its pictures' memory.
  remove() {
    for (const link of this.element.querySelectorAll("a[download]")) URL.revokeObjectURL(link.href);
    this.element.remove();
  }
}

const seconds = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(value < 10 ? 2 : 1)} s`);

// The settings of a request in words: those of a preset by its name.
function settings({ seed, n, steps, guidance, strength, width, height, sampler, negative_prompt: negative }, { presets = {} }) {
  const seeds = n > 1 ? `seeds ${seed} to ${seed + n - 1}` : `seed ${seed}`;
  const quality = Object.keys(presets).find((name) => presets[name].steps === steps
    && agree(presets[name].sampler, sampler));
  const { name: _, ...knobs } = sampler;
  const words = Object.entries(knobs).filter(([, value]) => !quality && value !== false && value !== null)
    .map(([knob, value]) => `${knob.replaceAll("_", " ")}${value === true ? "" : ` ${value}`}`);
  if (quality) words.unshift(`${quality} quality`);
  if (negative) words.push(`not: ${negative}`);
  if (strength != null) words.push(`strength ${strength}`);
  if (width != null) words.push(`${width} × ${height} pixels`);
  return [seeds, `${steps} steps`, `guidance ${guidance}`, ...words].join(" · ");
}
