// The stage: one pane, or two side by side, with one scrubber and one set of overlays.

import { SCALES } from "./canvas.js";
import { Pane } from "./pane.js";
import { finishedShare } from "./run.js";

const REPLAY_MS = 3000; // a whole run, unless that would make its frames
const [FASTEST_MS, SLOWEST_MS] = [90, 700]; // shorter or longer than these
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const LEGENDS = {
  none: "Small tiles are unfinished patches. An orange rim marks those that get the work now.",
  finish: ["finished early", "late"],
  difficulty: ["easy", "hard"],
};

export class Stage {
  #panes = [];
  #replay = null;

  constructor(root) {
    this.root = root;
    this.easel = root.querySelector("#easel");
    this.scrubber = root.querySelector("#scrubber");
    this.scrubber.addEventListener("input", () => { this.#stop(); this.#scrub(); });
    root.querySelector("#replay").addEventListener("click", () => this.#play());
    root.querySelector("#overlays").addEventListener("change", () => this.#applyOptions());
    this.easel.addEventListener("pointermove", (event) => this.#point(event));
    this.easel.addEventListener("pointerout", () => this.#unpoint());
    this.easel.addEventListener("focusout", () => this.#unpoint());
    this.easel.addEventListener("keydown", (event) => this.#walk(event));
    this.#applyOptions();
  }

  // Shows runs, each under its title, or one under its prompt, and updates them as they change.
  show(runs, titles) {
    this.#stop();
    for (const pane of this.#panes) pane.remove();
    const { prompt, class_label: label } = runs[0].request;
    this.#panes = runs.map((run, index) => new Pane(run, runs.length > 1 ? titles[index] : prompt ?? label));
    this.easel.replaceChildren(...this.#panes.map(({ element }) => element));
    this.easel.dataset.panes = runs.length;
    this.root.querySelector("#controls").hidden = false;
    this.scrubber.value = this.scrubber.max = 0;
    for (const run of runs) run.addEventListener("change", () => this.#changed(run));
    this.#refresh({ jump: true });
  }

  // Whether the picture to start from takes the place of the pictures, to be painted on.
  set painting(yes) {
    this.root.toggleAttribute("data-painting", yes);
    this.root.querySelector("#editor").hidden = !yes;
  }

  #changed(run) {
    const pane = this.#panes.find((each) => each.run === run);
    if (pane) this.#refresh();
  }

  // Call after new frames. The scrubber follows the newest frame unless the user moved it back.
  #refresh(how) {
    const newest = this.scrubber.value === this.scrubber.max;
    this.scrubber.max = Math.max(0, Math.max(0, ...this.#panes.map(({ length }) => length)) - 1);
    if (newest && !this.#replay) this.scrubber.value = this.scrubber.max;
    for (const pane of this.#panes) pane.update();
    this.#applyOptions();
    this.root.querySelector("#replay").disabled = this.scrubber.max < 1;
    this.scrubber.disabled = this.scrubber.max < 1;
    this.#draw();
    return this.#scrub(how ?? { jump: !newest });
  }

  #scrub(how = { jump: true }) {
    const share = this.scrubber.max > 0 ? this.scrubber.value / this.scrubber.max : 1;
    const words = this.#panes.map(({ run }) => place(run.pictures[0].frames, share));
    this.root.querySelector("#place").textContent = words[0];
    this.scrubber.setAttribute("aria-valuetext", words.join("; "));
    this.root.querySelector("#needle").setAttribute("x1", 100 * share);
    this.root.querySelector("#needle").setAttribute("x2", 100 * share);
    return Promise.all(this.#panes.map((pane) => pane.scrub(share, how)));
  }

  #play() {
    if (this.#replay) { this.#stop(); return; }
    this.scrubber.value = 0;
    this.#scrub();
    this.root.querySelector("#replay").setAttribute("aria-pressed", "true");
    this.#replay = setInterval(() => {
      this.scrubber.value = Number(this.scrubber.value) + 1;
      this.#scrub({ jump: false });
      if (this.scrubber.value === this.scrubber.max) this.#stop();
    }, pace(Number(this.scrubber.max) + 1));
  }

  #stop() {
    clearInterval(this.#replay);
    this.#replay = null;
    this.root.querySelector("#replay").setAttribute("aria-pressed", "false");
  }

  #applyOptions() {
    const overlay = this.root.querySelector('[name="overlay"]:checked').value;
    const checked = (id) => this.root.querySelector(id).checked;
    const range = this.#range();
    for (const pane of this.#panes) {
      pane.options = { overlay, tiles: checked("#tiles"), crisp: checked("#crisp"), range };
    }
    const [legend, scale] = [LEGENDS[overlay], this.root.querySelector("#scale")];
    scale.hidden = overlay === "none";
    this.root.querySelector("#legend").textContent = overlay === "none" ? legend : "";
    if (scale.hidden) return;
    const ends = overlay === "finish" ? range.map((evaluation) => ` (after evaluation ${evaluation})`) : ["", ""];
    [scale.firstElementChild, scale.lastElementChild].forEach((end, at) => { end.textContent = legend[at] + ends[at]; });
    scale.children[1].style.background = `linear-gradient(90deg, ${SCALES[overlay].join(", ")})`;
  }

  // One scale for the finish maps of all panes, so that equal colours mean equal evaluations.
  #range() {
    const spans = this.#panes.map(({ span }) => span);
    const [first, last] = [Math.min(...spans.map(([from]) => from)), Math.max(...spans.map(([, to]) => to))];
    return first <= last ? [first, last] : [1, 1];
  }

  // Draws the mean timestep of the patches over the run, one line per pane, above the scrubber.
  #draw() {
    this.root.querySelectorAll("#graph path").forEach((path, index) => {
      const frames = this.#panes[index]?.run.pictures[0].frames ?? [];
      const points = frames.map((frame, at) =>
        `${((100 * at) / Math.max(1, frames.length - 1)).toFixed(2)} ${(30 * (1 - mean(frame.times))).toFixed(2)}`);
      path.setAttribute("d", points.length > 1 ? `M${points.join("L")}` : "");
    });
  }

  #canvas(element) {
    return this.#panes.flatMap(({ canvases }) => canvases).find((canvas) => canvas.element === element);
  }

  #point(event) {
    const canvas = this.#canvas(event.target);
    if (canvas?.frame) this.#read(canvas, canvas.patchAt(event));
  }

  // Arrow keys move over the patches of the focused picture.
  #walk(event) {
    const canvas = this.#canvas(event.target);
    const [across, down] = ARROWS[event.key] ?? [];
    if (!canvas?.frame || across === undefined) return;
    event.preventDefault();
    const { rows, columns, cursor } = canvas;
    const within = (at, count) => Math.min(count - 1, Math.max(0, at));
    const [row, column] = cursor === null ? [0, 0] : [Math.floor(cursor / columns) + down, (cursor % columns) + across];
    this.#read(canvas, within(row, rows) * columns + within(column, columns));
  }

  // Points at the same patch in all panes, for comparison.
  #read(canvas, patch) {
    for (const each of this.#panes.flatMap(({ canvases }) => canvases)) each.point(patch);
    this.root.querySelector("#patch").textContent = reading(canvas, patch);
  }

  #unpoint() {
    for (const each of this.#panes.flatMap(({ canvases }) => canvases)) each.point(null);
    this.root.querySelector("#patch").textContent = "";
  }
}

// Milliseconds for each frame of a replay.
export const pace = (frames) => Math.min(SLOWEST_MS, Math.max(FASTEST_MS, REPLAY_MS / frames));

const mean = (values) => values.reduce((total, value) => total + value, 0) / values.length;

function place(frames, share) {
  const frame = frames[Math.round(share * (frames.length - 1))];
  if (!frame) return "";
  return `Evaluation ${frame.evaluation} of ${frame.evaluations}, ${Math.round(100 * finishedShare(frame))} % finished`;
}

function reading({ columns, frame }, patch) {
  const place = `Row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}`;
  const words = [place, `t = ${frame.times[patch]}`];
  if (frame.finishedAt[patch]) words.push(`finished after evaluation ${frame.finishedAt[patch]}`);
  if (frame.difficulty) words.push(`difficulty ${frame.difficulty[patch].toPrecision(2)}`);
  return words.join(" · ");
}
