// Draws one picture so that progress is visible: an unfinished patch is a small tile, a finished one fills its place
// without seams. On request it shows a map of when patches finished, or of their difficulty.

const SETTLE_MS = 220; // a tile takes this long to reach the size its new timestep gives it
const GLOW_MS = 700; // after it finishes, its rim glows this long
const SHRINK = 0.3; // share of a tile's side that is missing at t = 0
const FADE = 0.45; // share of its opacity that is missing at t = 0
const RIM = "#ff8f4d";
const UNSEEN = "#8d879a";
const EVEN = 0.001; // timesteps closer than this count as equal
const ROOM_FOR_NUMBERS = 26; // CSS pixels; on smaller patches the finish map shows no numbers

export const SCALES = { // from least to most
  finish: ["#d9f5ec", "#7fd3c6", "#3f9fc0", "#3c62ad", "#3a2a73"],
  difficulty: ["#fff4d9", "#ffd08a", "#f79256", "#d6455d", "#6b1550"],
};

const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class PatchCanvas {
  #shown = []; // the timestep at which each tile is drawn now
  #target = [];
  #landed = []; // when each patch finished, if a moment ago
  #frame = null;
  #blob = null; // of the frame, when it was shown: a frame may get its picture later
  #bitmap = null;
  #sheet = document.createElement("canvas"); // the whole picture, scaled once
  #options = { overlay: "none", tiles: true, crisp: false, range: null };
  #moving = false;
  #turn = 0;

  // The run's request may ask for another size than the model's own, and its pictures may have another grid.
  constructor(run) {
    const { card, request } = run;
    this.run = run;
    this.element = document.createElement("canvas");
    this.element.style.aspectRatio = `${request.width ?? card.width} / ${request.height ?? card.height}`;
    this.cursor = null; // the patch under the pointer or keyboard cursor
    new ResizeObserver(() => this.#resize()).observe(this.element);
  }

  // Shows a frame; with `jump`, as for the scrubber, without animation.
  async show(frame, { jump = false } = {}) {
    const turn = this.#turn += 1;
    const { blob } = frame;
    const bitmap = blob === this.#blob ? this.#bitmap : blob && await createImageBitmap(blob);
    if (turn !== this.#turn) return; // a later frame was decoded first
    const now = performance.now();
    if (!jump) frame.times.forEach((t, patch) => { if (t >= 1 && this.#target[patch] < 1) this.#landed[patch] = now; });
    else this.#landed = [];
    [this.#frame, this.#blob, this.#bitmap, this.#target] = [frame, blob, bitmap, frame.times];
    if (jump || calm.matches || this.#shown.length !== frame.times.length) this.#shown = [...frame.times];
    this.#scale();
    this.#move();
  }

  get options() { return this.#options; }

  set options(options) {
    this.#options = options;
    this.#scale();
    this.#paint();
  }

  get frame() { return this.#frame; }
  get rows() { return this.run.grid[0]; }
  get columns() { return this.run.grid[1]; }

  patchAt({ offsetX, offsetY }) {
    const { clientWidth, clientHeight } = this.element;
    const place = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at / size) * count)));
    return place(offsetY, clientHeight, this.rows) * this.columns + place(offsetX, clientWidth, this.columns);
  }

  point(patch) {
    this.cursor = patch;
    this.#paint();
  }

  #resize() {
    const { clientWidth, clientHeight } = this.element;
    const [width, height] = [clientWidth, clientHeight].map((size) => Math.max(1, Math.round(size * devicePixelRatio)));
    Object.assign(this.element, { width, height });
    this.#scale();
    this.#paint();
  }

  // Before the first preview there is nothing to see of a picture but its patches.
  #scale() {
    Object.assign(this.#sheet, { width: this.element.width, height: this.element.height });
    const context = this.#sheet.getContext("2d");
    if (!this.#bitmap) {
      context.fillStyle = UNSEEN;
      context.fillRect(0, 0, this.#sheet.width, this.#sheet.height);
      return;
    }
    Object.assign(context, { imageSmoothingEnabled: !this.#options.crisp, imageSmoothingQuality: "high" });
    if (this.#options.overlay !== "none") context.filter = "grayscale(1)";
    context.drawImage(this.#bitmap, 0, 0, this.#sheet.width, this.#sheet.height);
  }

  #move() {
    if (this.#moving) return;
    this.#moving = true;
    let last = performance.now();
    const tick = (now) => {
      const share = 1 - Math.exp((-3 * Math.max(0, now - last)) / SETTLE_MS);
      last = now;
      this.#shown = this.#shown.map((t, patch) => {
        const ahead = this.#target[patch] - t;
        return Math.abs(ahead) < 0.004 ? this.#target[patch] : t + ahead * share;
      });
      this.#paint(now);
      const glowing = this.#landed.some((at) => at && now - at < GLOW_MS);
      this.#moving = this.#shown.some((t, patch) => t !== this.#target[patch]) || (glowing && !calm.matches);
      if (this.#moving) requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  #paint(now = performance.now()) {
    if (!this.#frame) return;
    const context = this.element.getContext("2d");
    context.clearRect(0, 0, this.element.width, this.element.height);
    const colours = this.#colours();
    for (let patch = 0; patch < this.#shown.length; patch += 1) this.#tile(context, patch, colours?.[patch], now);
    if (this.#options.tiles && colours === null) this.#work(context);
    if (this.#options.overlay === "finish") this.#numbers(context, colours);
    if (this.cursor !== null) this.#outline(context, this.cursor, "#fff", 1);
  }

  #cell(patch) {
    const edge = (at, size, count) => Math.round((at * size) / count);
    const [row, column] = [Math.floor(patch / this.columns), patch % this.columns];
    const [left, top] = [edge(column, this.element.width, this.columns), edge(row, this.element.height, this.rows)];
    const right = edge(column + 1, this.element.width, this.columns);
    const bottom = edge(row + 1, this.element.height, this.rows);
    return { left, top, width: right - left, height: bottom - top };
  }

  #tile(context, patch, colour, now) {
    const { left, top, width, height } = this.#cell(patch);
    const away = this.#options.tiles ? 1 - Math.min(1, this.#shown[patch]) : 0;
    const inset = away > 0 ? this.#inset(patch) : 0;
    const place = [left + inset, top + inset, width - 2 * inset, height - 2 * inset];
    context.save();
    context.globalAlpha = 1 - FADE * away;
    if (away > 0) {
      context.beginPath();
      context.roundRect(...place, 2 * inset);
      context.clip();
    }
    context.drawImage(this.#sheet, left, top, width, height, ...place);
    if (colour) {
      context.globalAlpha = 0.78;
      context.fillStyle = colour;
      context.fillRect(left, top, width, height);
    }
    context.restore();
    const age = (now - (this.#landed[patch] ?? -GLOW_MS)) / GLOW_MS;
    if (this.#options.tiles && !calm.matches && age < 1) this.#outline(context, patch, RIM, 1 - age);
  }

  // Draws a rim around the patches that are behind the others: they get the work.
  #work(context) {
    const front = Math.max(...this.#target);
    this.#target.forEach((t, patch) => {
      if (t < 1 && front - t > EVEN) this.#outline(context, patch, RIM, 0.85, this.#inset(patch));
    });
  }

  #inset(patch) { return Math.round((this.#cell(patch).width * SHRINK * (1 - Math.min(1, this.#shown[patch]))) / 2); }

  #outline(context, patch, colour, strength, inset = 0) {
    const { left, top, width, height } = this.#cell(patch);
    const line = Math.max(1, 2 * devicePixelRatio);
    const round = 2 * inset;
    context.save();
    Object.assign(context, { strokeStyle: colour, lineWidth: line, globalAlpha: strength });
    Object.assign(context, { shadowColor: "#0008", shadowBlur: colour === "#fff" ? line : 0 });
    const edge = inset + line / 2;
    context.beginPath();
    context.roundRect(left + edge, top + edge, width - 2 * edge, height - 2 * edge, round);
    context.stroke();
    context.restore();
  }

  // A colour per patch, null where the value is unknown; or null if no map is shown.
  #colours() {
    const { overlay, range } = this.#options;
    if (overlay === "none") return null;
    const values = overlay === "finish" ? finishes(this.#frame, range) : difficulties(this.#frame);
    return values.map((value) => (value === null ? null : shade(SCALES[overlay], value)));
  }

  #numbers(context, colours) {
    const { width, height } = this.#cell(0);
    if (Math.min(width, height) < ROOM_FOR_NUMBERS * devicePixelRatio) return;
    Object.assign(context, { textAlign: "center", textBaseline: "middle" });
    context.font = `600 ${Math.round(height * 0.3)}px system-ui, sans-serif`;
    this.#frame.finishedAt.forEach((evaluation, patch) => {
      if (!evaluation) return;
      const cell = this.#cell(patch);
      context.fillStyle = dark(colours[patch]) ? "#fff" : "#15202b";
      context.fillText(evaluation, cell.left + cell.width / 2, cell.top + cell.height / 2);
    });
  }
}

// When each patch finished: 0 for the first and 1 for the last evaluation of the range, null if it has not.
function finishes({ finishedAt }, [first, last]) {
  return finishedAt.map((evaluation) => (evaluation ? (evaluation - first) / Math.max(1, last - first) : null));
}

// Each patch's predicted variance, scaled to 0..1 within the picture. Logarithms, because variances differ widely.
function difficulties({ difficulty, times }) {
  if (!difficulty) return times.map(() => null);
  const logs = difficulty.map((variance) => Math.log(Math.max(variance, 1e-6)));
  const [least, most] = [Math.min(...logs), Math.max(...logs)];
  return logs.map((log) => (log - least) / (most - least || 1));
}

function shade(scale, value) {
  const at = Math.min(1, Math.max(0, value)) * (scale.length - 1);
  const below = Math.min(scale.length - 2, Math.floor(at));
  const [from, to] = [scale[below], scale[below + 1]].map(channels);
  return `rgb(${from.map((channel, index) => Math.round(channel + (to[index] - channel) * (at - below))).join(" ")})`;
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function dark(rgb) {
  const [red, green, blue] = rgb.match(/\d+/g).map(Number);
  return 0.3 * red + 0.59 * green + 0.11 * blue < 130;
}
