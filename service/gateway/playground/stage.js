// The stage: one pane, or two side by side, under one scrubber and one set of overlays.

import { SCALES } from "./canvas.js";
import { Pane } from "./pane.js";
import { finishedShare } from "./run.js";

const REPLAY_MS = 90; // a frame
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const LEGENDS = {
  none: "Tiles float while their patch is being made and close up when it is finished. Rimmed ones get the work.",
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

  // Puts runs on the stage, each under its title, and follows them.
  show(runs, titles) {
    this.#stop();
    for (const pane of this.#panes) pane.remove();
    this.#panes = runs.map((run, index) => new Pane(run, titles[index]));
    this.easel.replaceChildren(...this.#panes.map(({ element }) => element));
    this.easel.dataset.panes = runs.length;
    this.root.querySelector("#controls").hidden = false;
    this.scrubber.value = this.scrubber.max = 0;
    for (const run of runs) run.addEventListener("change", () => this.#changed(run));
    this.#applyOptions();
    this.#refresh({ jump: true });
  }

  get runs() { return this.#panes.map(({ run }) => run); }

  #changed(run) {
    const pane = this.#panes.find((each) => each.run === run);
    if (pane) this.#refresh();
  }

  // After new frames: whoever watches the newest goes on watching it, whoever looked back stays there.
  #refresh(how) {
    const newest = this.scrubber.value === this.scrubber.max;
    this.scrubber.max = Math.max(0, Math.max(0, ...this.#panes.map(({ length }) => length)) - 1);
    if (newest && !this.#replay) this.scrubber.value = this.scrubber.max;
    for (const pane of this.#panes) pane.update();
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
    }, REPLAY_MS);
  }

  #stop() {
    clearInterval(this.#replay);
    this.#replay = null;
    this.root.querySelector("#replay").setAttribute("aria-pressed", "false");
  }

  #applyOptions() {
    const overlay = this.root.querySelector('[name="overlay"]:checked').value;
    const checked = (id) => this.root.querySelector(id).checked;
    for (const pane of this.#panes) pane.options = { overlay, tiles: checked("#tiles"), crisp: checked("#crisp") };
    const [legend, scale] = [LEGENDS[overlay], this.root.querySelector("#scale")];
    scale.hidden = overlay === "none";
    this.root.querySelector("#legend").textContent = overlay === "none" ? legend : "";
    if (scale.hidden) return;
    [scale.firstElementChild.textContent, scale.lastElementChild.textContent] = legend;
    scale.children[1].style.background = `linear-gradient(90deg, ${SCALES[overlay].join(", ")})`;
  }

  // How far the patches have come on average, over the run: a line for each pane, above the scrubber.
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

  // Arrow keys walk over the patches of the picture in focus.
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

  // All panes point at the same patch, so that it can be compared.
  #read(canvas, patch) {
    for (const each of this.#panes.flatMap(({ canvases }) => canvases)) each.point(patch);
    this.root.querySelector("#patch").textContent = reading(canvas, patch);
  }

  #unpoint() {
    for (const each of this.#panes.flatMap(({ canvases }) => canvases)) each.point(null);
    this.root.querySelector("#patch").textContent = "";
  }
}

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
