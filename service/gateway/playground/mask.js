// Paints on a large copy of the picture to start from: which of its patches may change.

import { placed } from "./size.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const MARK = "#ff8f4d";
const EDGE = 1e-6; // shares closer than this to a picture's edge are at it

const $ = (id) => document.getElementById(id);
const within = (at, count) => Math.min(count - 1, Math.max(0, at));

// Fires `change` when the marks change.
export class MaskEditor extends EventTarget {
  #bitmap = null;
  #frame = { width: 1, height: 1 }; // the finished picture, whose patches are painted on
  #grid = [1, 1]; // rows and columns
  #marked = new Set();
  #cursor = 0;
  #brush = null; // true marks, false unmarks; null while no button is down
  #last = null; // where the brush was, in patches: [column, row], fractional

  constructor() {
    super();
    this.canvas = $("mask");
    $("mark-all").addEventListener("click", () => this.#mark(() => true));
    $("mark-none").addEventListener("click", () => this.#mark(() => false));
    $("mark-others").addEventListener("click", () => this.#mark((patch) => !this.#marked.has(patch)));
    this.#paintable();
    new ResizeObserver(() => this.#draw()).observe(this.canvas);
  }

  get marked() { return [...this.#marked].sort((a, b) => a - b); }
  get #count() { return `${this.#marked.size} of ${this.#grid[0] * this.#grid[1]} patches marked`; }

  // Sets the size of the finished picture, and the grid on which it is drawn. Another grid has other patches, so the
  // marks are cleared; so are those that another size leaves beside the picture.
  fit({ grid, width, height }) {
    const same = String(grid) === String(this.#grid);
    if (same && width === this.#frame.width && height === this.#frame.height) return;
    this.#grid = grid;
    this.#frame = { width, height };
    this.#cursor = 0;
    this.canvas.style.setProperty("--ratio", width / height);
    this.mark(same ? this.marked : []);
  }

  // Shows a picture without marks; null shows none.
  open(bitmap) {
    this.#bitmap = bitmap;
    this.mark([]);
  }

  // Marks these patches and no others.
  mark(patches) {
    this.#marked = new Set(patches.filter((patch) => this.#isOnPicture(patch)));
    this.#show();
  }

  // Of the picture's size in pixels, transparent where it may change. Pixels shared with a kept patch stay opaque.
  toBlob() {
    const { width, height } = this.#bitmap;
    const sheet = new OffscreenCanvas(width, height);
    const context = sheet.getContext("2d");
    context.fillRect(0, 0, width, height);
    for (const patch of this.#marked) {
      const [[left, right], [top, bottom]] = this.#within(patch);
      const [across, down] = [inside(left, right, width), inside(top, bottom, height)];
      context.clearRect(across[0], down[0], across[1], down[1]);
    }
    return sheet.convertToBlob({ type: "image/png" });
  }

  // Where a patch lies in the picture, as shares of its sides: [[left, right], [top, bottom]].
  #within(patch) {
    const [rows, columns] = this.#grid;
    const { left, top, width, height } = placed(this.#bitmap, this.#frame);
    const side = (at, count, whole, from, size) => [at, at + 1].map((edge) => ((edge * whole) / count - from) / size);
    return [
      side(patch % columns, columns, this.#frame.width, left, width),
      side(Math.floor(patch / columns), rows, this.#frame.height, top, height),
    ];
  }

  // What is beside a picture of another shape stays white.
  #isOnPicture(patch) {
    return this.#bitmap !== null && this.#within(patch).every(([from, to]) => from < 1 - EDGE && to > EDGE);
  }

  #show() {
    $("marked").textContent = this.#marked.size
      ? `${this.#count}. All other pixels stay as they are.`
      : "Without marks, the whole picture may change.";
    this.#draw();
    this.dispatchEvent(new Event("change"));
  }

  #mark(wanted) {
    const [rows, columns] = this.#grid;
    this.mark(Array.from({ length: rows * columns }, (_, patch) => patch).filter(wanted));
  }

  #set(patches, marked) {
    for (const patch of patches) {
      if (marked && this.#isOnPicture(patch)) this.#marked.add(patch);
      else this.#marked.delete(patch);
      this.#cursor = patch;
    }
    this.#show();
  }

  // Marks patches by pointer; `#key` does so by keyboard.
  #paintable() {
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.#last = this.#at(event);
      const [patch] = this.#crossed(this.#last, this.#last);
      this.#brush = !this.#marked.has(patch);
      this.#set([patch], this.#brush);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (this.#brush === null) return;
      const to = this.#at(event);
      this.#set(this.#crossed(this.#last, to), this.#brush);
      this.#last = to;
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { this.#brush = null; });
    for (const focus of ["focus", "blur"]) this.canvas.addEventListener(focus, () => this.#draw());
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #at({ offsetX, offsetY }) {
    const [rows, columns] = this.#grid;
    return [(offsetX / this.canvas.clientWidth) * columns, (offsetY / this.canvas.clientHeight) * rows];
  }

  // Every patch on the straight line between two places: a fast pointer reports few of them.
  #crossed(from, to) {
    const [rows, columns] = this.#grid;
    return crossed(from, to).filter(([column, row]) => column >= 0 && row >= 0 && column < columns && row < rows)
      .map(([column, row]) => row * columns + column);
  }

  #key(event) {
    const [rows, columns] = this.#grid;
    const [row, column] = [Math.floor(this.#cursor / columns), this.#cursor % columns];
    const [across, down] = ARROWS[event.key] ?? [0, 0];
    if (event.key === " ") this.#set([this.#cursor], !this.#marked.has(this.#cursor));
    else if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const moved = within(row + down, rows) * columns + within(column + across, columns);
    if (moved !== this.#cursor && event.shiftKey) this.#set([moved], this.#marked.has(this.#cursor)); // extends the mark
    this.#cursor = moved;
    const state = this.#marked.has(moved) ? "may change" : "is kept";
    $("marked").textContent = `Row ${Math.floor(moved / columns) + 1}, column ${(moved % columns) + 1} ${state} · ${this.#count}.`;
    this.#draw();
  }

  #draw() {
    if (!this.#bitmap) return;
    const [rows, columns] = this.#grid;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight].map(
      (size) => Math.max(1, Math.round(size * devicePixelRatio)));
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#fff"; // transparent parts become white, as on the server
    context.fillRect(0, 0, width, height);
    const place = placed(this.#bitmap, this.#frame);
    const [across, down] = [width / this.#frame.width, height / this.#frame.height];
    context.drawImage(this.#bitmap, across * place.left, down * place.top, across * place.width, down * place.height);
    const cell = (patch) => {
      const [left, top] = [(width * (patch % columns)) / columns, (height * Math.floor(patch / columns)) / rows];
      return [left, top, width / columns, height / rows];
    };
    context.fillStyle = MARK;
    context.globalAlpha = 0.72;
    for (const patch of this.#marked) context.fillRect(...cell(patch));
    Object.assign(context, { globalAlpha: 0.28, strokeStyle: "#888", lineWidth: devicePixelRatio });
    context.beginPath();
    for (let patch = 0; patch < rows * columns; patch += 1) context.rect(...cell(patch));
    context.stroke();
    if (document.activeElement !== this.canvas) return;
    for (const [strokeStyle, lineWidth] of [["#fff", 5], ["#211e27", 2]]) {
      Object.assign(context, { globalAlpha: 1, strokeStyle, lineWidth: lineWidth * devicePixelRatio });
      context.strokeRect(...cell(this.#cursor));
    }
  }
}

// The whole pixels [first, count] of a side between two shares of it, at least one.
function inside(from, to, size) {
  const [first, end] = [Math.ceil(Math.max(0, from) * size - EDGE), Math.floor(Math.min(1, to) * size + EDGE)];
  return first < end ? [first, end - first] : [Math.min(size - 1, end), 1];
}

// The unit cells [x, y] that a straight line enters, in order, after Amanatides and Woo (1987).
export function crossed([fromX, fromY], [toX, toY]) {
  const [x, y] = [axis(fromX, toX), axis(fromY, toY)];
  const cells = [[x.cell, y.cell]];
  for (let left = Math.abs(x.end - x.cell) + Math.abs(y.end - y.cell); left > 0; left -= 1) {
    const next = y.cell === y.end || (x.cell !== x.end && x.next < y.next) ? x : y;
    next.cell += next.step;
    next.next += next.stride;
    cells.push([x.cell, y.cell]);
  }
  return cells;
}

// Along one axis: first and last cell, and at which share of the line the next border comes.
function axis(from, to) {
  const [cell, end, step] = [Math.floor(from), Math.floor(to), Math.sign(to - from)];
  const stride = step === 0 ? Infinity : 1 / Math.abs(to - from);
  const border = step > 0 ? cell + 1 : cell;
  return { cell, end, step, stride, next: step === 0 ? Infinity : Math.abs(border - from) * stride };
}
