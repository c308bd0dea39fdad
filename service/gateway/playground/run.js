// A run: one job from submission to report, with every frame received of its pictures.

import * as api from "./api.js";

// A frame is {evaluation, evaluations, times, difficulty, finishedAt, done, dense, blob}. The last frame is the result.
// While the picture is made, blob is null until its first preview; afterwards earlier frames show that preview too.
export class Run extends EventTarget {
  constructor(card, request, source = null) {
    super();
    this.card = card;
    this.grid = card.grid; // rows and columns of patches; events say if a picture has others
    this.request = request;
    this.source = source; // the picture it started from: {image, mask, marked}
    this.id = null;
    this.state = "waiting"; // then running, completed, failed, cancelled or expired
    this.report = null;
    this.pictures = Array.from({ length: request.n }, () => ({ frames: [], final: null, finishedAt: this.#nowhere() }));
  }

  static async submit(card, request, source) {
    const job = await api.submit(request);
    const run = new Run(card, job.request, source);
    run.id = job.id;
    run.began = performance.now();
    return run;
  }

  get ended() { return !["waiting", "running"].includes(this.state); }
  get seconds() { return this.report?.duration_seconds ?? (performance.now() - this.began) / 1000; }

  // Patch evaluations so far, and those of a dense run at the same point.
  get work() {
    if (this.report) return { done: this.report.patch_evaluations, dense: this.report.dense_patch_evaluations };
    const latest = this.pictures.map(({ frames }) => frames.at(-1)).filter(Boolean);
    const sum = (field) => latest.reduce((total, frame) => total + frame[field], 0);
    return { done: sum("done"), dense: sum("dense") };
  }

  get progress() {
    if (this.state === "completed") return 1;
    const shares = this.pictures.map(({ frames }) => frames.at(-1)).map(
      (frame) => (frame ? frame.evaluation / frame.evaluations : 0));
    return shares.reduce((total, share) => total + share, 0) / shares.length;
  }

  // Resolves when the job has ended, in any state; rejects if its events cannot be read.
  async follow() {
    for await (const event of api.events(this.id)) {
      if (event.grid) this.#regrid(event.grid);
      if (event.type === "started") this.#start();
      else if (event.type === "preview") this.#preview(event);
      else if (event.type === "patches") this.#finished(event);
      else if (event.type === "image") await this.#arrive(event.index);
      else if (event.type === "completed") this.#complete(event.report);
      else if (api.TERMINAL.has(event.type)) this.state = event.type;
      this.#tell(event);
    }
  }

  cancel(options) { return this.ended ? null : api.cancel(this.id, options); }

  // What the history stores; `restore` turns it back into a run.
  record() {
    const { id, card, grid, request, source, state, report, pictures } = this;
    return { id, card, grid, request, source, state, report, pictures };
  }

  static restore({ card, request, ...rest }) { return Object.assign(new Run(card, request), rest); }

  #start() { // comes again if a worker died: the job restarts with the same seed
    this.state = "running";
    for (const picture of this.pictures) Object.assign(picture, { frames: [], finishedAt: this.#nowhere() });
  }

  #nowhere() { return Array(this.grid[0] * this.grid[1]).fill(0); } // 0 for unfinished patches

  #regrid(grid) {
    if (String(grid) === String(this.grid)) return;
    this.grid = grid;
    for (const picture of this.pictures) picture.finishedAt = this.#nowhere();
  }

  #note(picture, patches, evaluation) {
    picture.finishedAt = [...picture.finishedAt];
    for (const patch of patches) picture.finishedAt[patch] ||= evaluation;
  }

  // Patches finished between previews: repeats the last frame with these patches finished.
  #finished({ index, patches, evaluation, evaluations }) {
    const picture = this.pictures[index];
    this.#note(picture, patches, evaluation);
    const { times, ...last } = picture.frames.at(-1) ?? this.#unseen(evaluations);
    const settled = times.map((t, patch) => (picture.finishedAt[patch] ? 1 : t));
    picture.frames.push({ ...last, evaluation, times: settled, finishedAt: picture.finishedAt });
  }

  #unseen(evaluations) {
    return { evaluations, times: this.#nowhere(), difficulty: null, done: 0, dense: 0, blob: null };
  }

  // A finished picture is shown at once: others of the job may take a while.
  async #arrive(index) {
    const picture = this.pictures[index];
    picture.final = await api.picture(this.id, index);
    const last = picture.frames.at(-1) ?? { ...this.#unseen(1), evaluation: 1, finishedAt: picture.finishedAt };
    picture.frames.push({ ...last, times: last.times.map(() => 1), blob: picture.final });
  }

  #preview(event) {
    const picture = this.pictures[event.index];
    const settled = event.times.flatMap((t, patch) => (t >= 1 ? [patch] : []));
    this.#note(picture, settled, event.evaluation);
    const blob = bytes(event.b64_png);
    for (const frame of picture.frames) frame.blob ??= blob;
    picture.frames.push({
      evaluation: event.evaluation,
      evaluations: event.evaluations,
      times: event.times,
      difficulty: event.difficulty ?? null,
      finishedAt: picture.finishedAt,
      done: event.patch_evaluations,
      dense: event.dense_patch_evaluations,
      blob,
    });
  }

  #complete(report) {
    this.state = "completed";
    this.report = report;
    this.grid = [report.grid_rows, report.grid_columns];
    this.pictures.forEach(({ frames, final }, index) => {
      const image = report.images[index];
      const evaluations = Math.max(...image.finished_at);
      for (const frame of frames) frame.blob ??= final;
      if (frames.at(-1)?.blob === final) frames.pop(); // what `#arrive` showed, now with the report's figures
      frames.push({
        evaluation: evaluations,
        evaluations,
        times: image.finished_at.map(() => 1),
        difficulty: image.difficulty,
        finishedAt: image.finished_at,
        done: image.patch_evaluations,
        dense: image.dense_patch_evaluations,
        blob: final,
      });
    });
  }

  #tell(event) { this.dispatchEvent(new CustomEvent("change", { detail: event })); }
}

export const finishedShare = ({ times }) => times.filter((t) => t >= 1).length / times.length;

function bytes(base64) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
}
