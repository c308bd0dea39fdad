// A pane: one run on the stage, with its pictures, its savings and its times.

import { PatchCanvas } from "./canvas.js";
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
    this.canvases = run.pictures.map(() => new PatchCanvas(run.card, run.request));
    this.figures = this.canvases.map((canvas, index) => this.#figure(canvas, index));
    this.#part("title").textContent = title;
    this.#part("settings").textContent = settings(run.request);
    const gallery = this.#part("pictures");
    gallery.replaceChildren(...this.figures);
    gallery.dataset.count = this.figures.length > 4 ? "many" : this.figures.length > 1 ? "some" : "one";
    this.update();
  }

  get length() { return Math.max(0, ...this.run.pictures.map(({ frames }) => frames.length)); }

  set options(options) { for (const canvas of this.canvases) canvas.options = options; }

  // Shows the frames at `share` of the run seen so far, 0 to 1.
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
    this.#part("bar").style.width = dense ? `${(100 * done) / dense}%` : "0";
    this.#part("progress").value = run.progress;
    this.#part("time").textContent = run.report || !run.ended ? seconds(run.seconds) : "–";
    this.#part("queue").textContent = run.report ? seconds(run.report.queue_seconds) : "–";
    this.#part("first").textContent = seconds(run.report?.time_to_first_preview_seconds);
    this.element.dataset.state = run.state;
    run.pictures.forEach(({ final }, index) => this.#offer(final, index));
  }

  #part(name) { return this.element.querySelector(`[data-part="${name}"]`); }

  #figure(canvas, index) {
    const figure = document.createElement("figure");
    canvas.element.tabIndex = 0;
    canvas.element.setAttribute("role", "img");
    canvas.element.setAttribute("aria-label", `Picture ${index + 1}, not begun`);
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
    const seed = this.run.request.seed + index;
    const link = Object.assign(document.createElement("a"), {
      href: URL.createObjectURL(final),
      textContent: "Save",
      download: `patchforge-${seed}.${this.run.request.output_format}`,
    });
    link.setAttribute("aria-label", `Save picture ${index + 1}`);
    const edit = Object.assign(document.createElement("button"), { type: "button", textContent: "Edit" });
    edit.setAttribute("aria-label", `Edit picture ${index + 1}`);
    edit.addEventListener("click", () => edit.dispatchEvent(new CustomEvent("edit", { detail: final, bubbles: true })));
    const offers = Object.assign(document.createElement("div"), { className: "offers" });
    offers.append(edit, link);
    figure.append(offers);
  }

  // The page forgets the pictures it no longer shows.
  remove() {
    for (const link of this.element.querySelectorAll("a[download]")) URL.revokeObjectURL(link.href);
    this.element.remove();
  }
}

const seconds = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(value < 10 ? 2 : 1)} s`);

function settings({ seed, n, steps, guidance, strength, width, height, sampler: { name, ...knobs } }) {
  const seeds = n > 1 ? `seeds ${seed} to ${seed + n - 1}` : `seed ${seed}`;
  const words = Object.entries(knobs).filter(([, value]) => value !== false && value !== null)
    .map(([knob, value]) => `${knob.replaceAll("_", " ")}${value === true ? "" : ` ${value}`}`);
  if (strength != null) words.push(`strength ${strength}`);
  if (width != null) words.push(`${width} × ${height} pixels`);
  return [seeds, `${steps} steps`, `guidance ${guidance}`, ...words].join(" · ");
}
