// Chooses what a run starts from: a picture, and the patches of it that may change.

import { MaskEditor } from "./mask.js";
import { readSettings } from "./metadata.js";

const MOST_PIXELS = 2 ** 20; // larger pictures are scaled down before they are sent
const KINDS = ["image/png", "image/webp", "image/jpeg"];
const USUAL = { marked: 1, plain: 0.6 }; // default strengths, with and without marked patches

// The samplers that can start from a picture.
export const STARTERS = ["adaptive"];

const $ = (id) => document.getElementById(id);

// Fires `change` when a picture is chosen or removed, `paint` when the user wants to paint on it, and `settings`, with
// fields of a request, when the user wants a picture made again.
export class SourcePicker extends EventTarget {
  #picture = null; // {bitmap, blob}
  #taking = null;
  #strengthChosen = false;
  #settings = null; // those in the file last chosen

  constructor() {
    super();
    this.mask = new MaskEditor();
    this.mask.addEventListener("change", () => this.#showStrength());
    this.slider = $("strength-slider");
    $("file").addEventListener("change", ({ target }) => { this.#chosen(target.files[0]); target.value = ""; });
    document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
    document.addEventListener("drop", (event) => this.#dropped(event));
    document.addEventListener("paste", ({ clipboardData: { files } }) => { if (files.length > 0) this.#chosen(files[0]); });
    $("use-settings").addEventListener("click", () => { this.clear(); this.#restore(this.#settings); });
    $("paint").addEventListener("click", () => this.dispatchEvent(new Event("paint")));
    $("drop-source").addEventListener("click", () => { this.clear(); $("file").focus(); });
    $("strength").addEventListener("input", () => this.#choose($("strength").value));
    this.slider.addEventListener("input", () => {
      this.#choose(this.slider.value);
      $("strength").dispatchEvent(new Event("change", { bubbles: true }));
    });
  }

  get size() { return this.#picture && { width: this.#picture.bitmap.width, height: this.#picture.bitmap.height }; }
  get strength() { return Number($("strength").value); }

  // Takes a picture. Rejects with a message for the user if the file is not one.
  take(blob, how) {
    const taking = this.#take(blob, how);
    this.#taking = taking.catch(() => null);
    return taking;
  }

  async #take(blob, { strength = null } = {}) {
    if (blob.type && !KINDS.includes(blob.type)) throw new Error("Choose a PNG, WebP or JPEG picture.");
    const found = await createImageBitmap(blob).catch(() => { throw new Error("This file is not a valid picture."); });
    this.#picture = await fitted(found);
    this.#strengthChosen = strength !== null;
    if (strength !== null) $("strength").value = this.slider.value = strength;
    this.mask.open(this.#picture.bitmap);
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  clear() {
    if (!this.#picture) return;
    this.#picture = null;
    this.mask.open(null);
    this.#show();
    this.dispatchEvent(new Event("change"));
  }

  // What a run stores: {image, mask, marked}, image and mask as files; null without a picture.
  async read() {
    await this.#taking; // a picture may still be loading
    if (!this.#picture) return null;
    const { marked } = this.mask;
    return { image: this.#picture.blob, mask: marked.length > 0 ? await this.mask.toBlob() : null, marked };
  }

  // A picture dropped on its field is one to start from; dropped elsewhere, one to make again, if it says how.
  async #dropped(event) {
    if (!hasFiles(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    const settings = $("source").contains(event.target) ? null : await readSettings(file);
    if (settings === null) await this.#chosen(file);
    else this.#restore(settings);
  }

  async #chosen(file) {
    $("source-problem").textContent = "";
    this.#settings = null;
    try {
      await this.take(file);
      this.#settings = await readSettings(file);
      $("settings-found").hidden = this.#settings === null;
      this.dispatchEvent(new Event("paint"));
    } catch (error) {
      $("source-problem").textContent = error.message;
    }
  }

  #restore(settings) { this.dispatchEvent(new CustomEvent("settings", { detail: settings })); }

  #show() {
    $("chosen").hidden = !this.#picture;
    $("drop").hidden = Boolean(this.#picture);
    $("settings-found").hidden = true;
    $("source-problem").textContent = "";
    URL.revokeObjectURL($("thumbnail").src);
    $("thumbnail").removeAttribute("src");
    if (this.#picture) $("thumbnail").src = URL.createObjectURL(this.#picture.blob);
    this.#showStrength();
  }

  #showStrength() {
    if (!this.#strengthChosen) $("strength").value = this.slider.value = this.mask.marked.length ? USUAL.marked : USUAL.plain;
  }

  #choose(strength) {
    this.#strengthChosen = true;
    $("strength").value = this.slider.value = strength;
  }
}

const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");

// Returns the picture as PNG, scaled down to at most MOST_PIXELS.
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
