// A run: one job from its submission to its report, and every frame seen of its pictures on the way.

import * as api from "./api.js";

// A frame: {evaluation, evaluations, times, difficulty, finishedAt, done, dense, blob}; the last is the picture.
export class Run extends EventTarget {
  constructor(card, request, source = null) {
    super();
    this.card = card;
    this.request = request;
    this.source = source; // what it started from: {image, mask, marked}
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

  // Work done so far, and what a dense run would have done by then.
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

  // Resolves when the job has ended, however; rejects if it cannot be followed.
  async follow() {
    for await (const event of api.events(this.id)) {
      if (event.type === "started") this.#start();
      else if (event.type === "preview") this.#preview(event);
      else if (event.type === "patches") this.#finished(event);
      else if (event.type === "image") this.pictures[event.index].final = await api.picture(this.id, event.index);
      else if (event.type === "completed") this.#complete(event.report);
      else if (api.TERMINAL.has(event.type)) this.state = event.type;
      this.#tell(event);
    }
  }

  cancel(options) { return this.ended ? null : api.cancel(this.id, options); }

  // What history keeps, and back.
  record() {
    const { id, card, request, source, state, report, pictures } = this;
    return { id, card, request, source, state, report, pictures };
  }

  static restore({ card, request, ...rest }) { return Object.assign(new Run(card, request), rest); }

  #start() { // again, if an earlier worker died: the same seed begins anew
    this.state = "running";
    for (const picture of this.pictures) Object.assign(picture, { frames: [], finishedAt: this.#nowhere() });
  }

  #nowhere() { return Array(this.card.grid[0] * this.card.grid[1]).fill(0); } // 0 for patches that still move

  #note(picture, patches, evaluation) {
    picture.finishedAt = [...picture.finishedAt];
    for (const patch of patches) picture.finishedAt[patch] ||= evaluation;
  }

  // Between previews: the last one again, with more of its patches in their place.
  #finished({ index, patches, evaluation }) {
    const picture = this.pictures[index];
    this.#note(picture, patches, evaluation);
    const last = picture.frames.at(-1);
    if (!last) return;
    const times = last.times.map((t, patch) => (picture.finishedAt[patch] ? 1 : t));
    picture.frames.push({ ...last, evaluation, times, finishedAt: picture.finishedAt });
  }

  #preview(event) {
    const picture = this.pictures[event.index];
    const settled = event.times.flatMap((t, patch) => (t >= 1 ? [patch] : []));
    this.#note(picture, settled, event.evaluation);
    picture.frames.push({
      evaluation: event.evaluation,
      evaluations: event.evaluations,
      times: event.times,
      difficulty: event.difficulty ?? null,
      finishedAt: picture.finishedAt,
      done: event.patch_evaluations,
      dense: event.dense_patch_evaluations,
      blob: bytes(event.b64_png),
    });
  }

  #complete(report) {
    this.state = "completed";
    this.report = report;
    this.pictures.forEach(({ frames, final }, index) => {
      const image = report.images[index];
      const evaluations = Math.max(...image.finished_at);
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
