// What a run starts from: a picture, and the patches of it that may change.

const MOST_PIXELS = 2 ** 20; // of the picture sent; a larger one is scaled down here
const KINDS = ["image/png", "image/webp", "image/jpeg"];
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const USUAL = { marked: 1, plain: 0.6 }; // strengths, until someone chooses
const MARK = "#ff8f4d";

// The sampler that can start from a picture, whatever others the server has.
export const STARTERS = ["adaptive"];

const $ = (id) => document.getElementById(id);

// Fires `change` when there is a picture where there was none, or the other way round.
export class SourcePicker extends EventTarget {
  #picture = null; // {bitmap, blob}
  #marked = new Set();
  #taking = null;
  #card = null;
  #cursor = 0;
  #brush = null; // true marks, false takes back; null while no button is held down
  #strengthChosen = false;

  constructor(root) {
    super();
    this.canvas = $("mask");
    this.slider = $("strength-slider");
    $("file").addEventListener("change", ({ target }) => { this.#chosen(target.files); target.value = ""; });
    root.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
    root.addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.#chosen(event.dataTransfer.files);
    });
    document.addEventListener("paste", ({ clipboardData: { files } }) => { if (files.length > 0) this.#chosen(files); });
    $("mark-all").addEventListener("click", () => this.#mark(() => true));
    $("mark-none").addEventListener("click", () => this.#mark(() => false));
    $("mark-others").addEventListener("click", () => this.#mark((patch) => !this.#marked.has(patch)));
    $("drop-source").addEventListener("click", () => { this.clear(); $("file").focus(); });
    $("strength").addEventListener("input", () => this.#choose($("strength").value));
    this.slider.addEventListener("input", () => {
      this.#choose(this.slider.value);
      $("strength").dispatchEvent(new Event("change", { bubbles: true }));
    });
    this.#paintable();
    new ResizeObserver(() => this.#draw()).observe(this.canvas);
  }

  get size() { return this.#picture && { width: this.#picture.bitmap.width, height: this.#picture.bitmap.height }; }
  get #count() { return `${this.#marked.size} of ${this.#card.grid[0] * this.#card.grid[1]} patches marked`; }
  get strength() { return Number($("strength").value); }

  // The model whose patches are marked; those of another grid are others.
  set card(card) {
    if (String(card.grid) !== String(this.#card?.grid)) this.#marked.clear();
    this.#card = card;
    this.canvas.style.aspectRatio = `${card.width} / ${card.height}`;
    this.#cursor = 0;
    this.#show();
  }

  // Rejects with words for the person if it is not a picture.
  take(blob, how) {
    const taking = this.#take(blob, how);
    this.#taking = taking.catch(() => null);
    return taking;
  }

  async #take(blob, { marked = [], strength = null } = {}) {
    if (blob.type && !KINDS.includes(blob.type)) throw new Error("PNG, WebP and JPEG are the pictures that can be read.");
    const found = await createImageBitmap(blob).catch(() => { throw new Error("This file cannot be read as a picture."); });
    this.#picture = await fitted(found);
    this.#marked = new Set(marked);
    this.#strengthChosen = strength !== null;
    if (strength !== null) $("strength").value = this.slider.value = strength;
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  clear() {
    if (!this.#picture) return;
    this.#picture = null;
    this.#marked.clear();
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  // What a run keeps of it: {image, mask, marked}, files both; null without a picture.
  async read() {
    await this.#taking; // one that has just been chosen, however large
    if (!this.#picture) return null;
    const marked = [...this.#marked].sort((a, b) => a - b);
    return { image: this.#picture.blob, mask: marked.length > 0 ? await this.#mask() : null, marked };
  }

  async #chosen(files) {
    $("source-problem").textContent = "";
    try {
      await this.take(files[0]);
    } catch (error) {
      $("source-problem").textContent = error.message;
    }
  }

  #show() {
    $("editor").hidden = !this.#picture;
    $("drop").hidden = Boolean(this.#picture);
    $("source-problem").textContent = "";
    if (!this.#picture) return;
    if (!this.#strengthChosen) $("strength").value = this.slider.value = this.#marked.size ? USUAL.marked : USUAL.plain;
    $("marked").textContent = this.#marked.size
      ? `${this.#count}; the others are kept to the pixel.`
      : "Mark the patches that may change. With none marked, all of them do, as far as the strength says.";
    this.#draw();
  }

  #choose(strength) {
    this.#strengthChosen = true;
    $("strength").value = this.slider.value = strength;
  }

  #mark(wanted) {
    const [rows, columns] = this.#card.grid;
    this.#marked = new Set(Array.from({ length: rows * columns }, (_, patch) => patch).filter(wanted));
    this.#show();
  }

  #set(patch, marked) {
    if (marked) this.#marked.add(patch);
    else this.#marked.delete(patch);
    this.#cursor = patch;
    this.#show();
  }

  // With a pointer held down or, for the patch in focus, with the arrow keys and space.
  #paintable() {
    const at = ({ offsetX, offsetY }) => {
      const [rows, columns] = this.#card.grid;
      const within = (place, size, count) => Math.min(count - 1, Math.max(0, Math.floor((place / size) * count)));
      return within(offsetY, this.canvas.clientHeight, rows) * columns + within(offsetX, this.canvas.clientWidth, columns);
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.#brush = !this.#marked.has(at(event));
      this.#set(at(event), this.#brush);
    });
    this.canvas.addEventListener("pointermove", (event) => { if (this.#brush !== null) this.#set(at(event), this.#brush); });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => { this.#brush = null; });
    for (const focus of ["focus", "blur"]) this.canvas.addEventListener(focus, () => this.#draw());
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const [rows, columns] = this.#card.grid;
    const [row, column] = [Math.floor(this.#cursor / columns), this.#cursor % columns];
    const [across, down] = ARROWS[event.key] ?? [0, 0];
    if (event.key === " ") this.#set(this.#cursor, !this.#marked.has(this.#cursor));
    else if (!(event.key in ARROWS)) return;
    event.preventDefault();
    const within = (place, count) => Math.min(count - 1, Math.max(0, place));
    const moved = within(row + down, rows) * columns + within(column + across, columns);
    if (moved !== this.#cursor && event.shiftKey) this.#set(moved, this.#marked.has(this.#cursor)); // goes on with it
    this.#cursor = moved;
    const state = this.#marked.has(moved) ? "may change" : "is kept";
    $("marked").textContent = `Row ${Math.floor(moved / columns) + 1}, column ${(moved % columns) + 1} ${state} · ${this.#count}.`;
    this.#draw();
  }

  #draw() {
    if (!this.#picture || !this.#card) return;
    const [rows, columns] = this.#card.grid;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight].map(
      (size) => Math.max(1, Math.round(size * devicePixelRatio)));
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.fillStyle = "#fff"; // as the server has it, behind what is transparent
    context.fillRect(0, 0, width, height);
    context.drawImage(this.#picture.bitmap, 0, 0, width, height);
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

  // As large as the picture, transparent where it may change: never a pixel that a kept patch has a part in.
  #mask() {
    const { width, height } = this.#picture.bitmap;
    const [rows, columns] = this.#card.grid;
    const sheet = new OffscreenCanvas(width, height);
    const context = sheet.getContext("2d");
    context.fillRect(0, 0, width, height);
    const inside = (at, size, count) => {
      const [from, to] = [Math.ceil((at * size) / count), Math.floor(((at + 1) * size) / count)];
      return from < to ? [from, to - from] : [Math.min(size - 1, to), 1];
    };
    for (const patch of this.#marked) {
      const [left, across] = inside(patch % columns, width, columns);
      const [top, down] = inside(Math.floor(patch / columns), height, rows);
      context.clearRect(left, top, across, down);
    }
    return sheet.convertToBlob({ type: "image/png" });
  }
}

const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");

// As PNG, upright, and no larger than is any use.
async function fitted(bitmap) {
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * scale)));
  const sheet = new OffscreenCanvas(width, height);
  const context = sheet.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const blob = await sheet.convertToBlob({ type: "image/png" });
  return { bitmap: await createImageBitmap(blob), blob };
}

export async function base64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}
