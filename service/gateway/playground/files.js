// Pictures as files: their names, larger copies, and many of them in one archive.

import { copyTexts, crc32 } from "./png.js";

export const LARGE = 1024; // pixels on the longer side of a larger copy
const ENDINGS = { png: "png", webp: "webp", jpeg: "jpg" };
const YEAR_1980 = (1 << 5) | 1; // the first day that an archive can name: pictures have no other date worth keeping

// The file's name of one picture of a request.
export function nameOf({ prompt, class_label: label, seed, output_format: format }, index) {
  const words = (prompt ?? label ?? "").toLowerCase().replaceAll(/[^\p{L}\p{N}]+/gu, "-").replaceAll(/^-+|-+$/g, "");
  return `${words.slice(0, 60) || "picture"}-${seed + index}.${ENDINGS[format ?? "png"]}`;
}

// [{name, blob}] of the pictures of runs; the names differ.
export function filesOf(runs) {
  const taken = new Map();
  return runs.flatMap(({ request, pictures }) => pictures.map(({ final }, index) => {
    const name = nameOf(request, index);
    const times = (taken.get(name) ?? 0) + 1;
    taken.set(name, times);
    return { name: times === 1 ? name : name.replace(/(\.\w+)$/, ` (${times})$1`), blob: final };
  })).filter(({ blob }) => blob);
}

export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading
}

// Saves one picture as it is, several as an archive.
export async function saveAll(runs, name) {
  const files = filesOf(runs);
  if (files.length === 1) save(files[0].blob, files[0].name);
  else if (files.length > 1) save(await zip(files), `${name}.zip`);
}

// A copy of a picture with LARGE pixels on its longer side, as PNG with the picture's own texts.
export async function enlarged(blob, { crisp }) {
  const { width, height } = await createImageBitmap(blob);
  const scale = Math.max(1, LARGE / Math.max(width, height));
  const size = { resizeWidth: Math.round(width * scale), resizeHeight: Math.round(height * scale) };
  const bitmap = await createImageBitmap(blob, { ...size, resizeQuality: crisp ? "pixelated" : "high" });
  const sheet = new OffscreenCanvas(bitmap.width, bitmap.height);
  sheet.getContext("2d").drawImage(bitmap, 0, 0);
  return copyTexts(blob, await sheet.convertToBlob({ type: "image/png" }));
}

// A ZIP archive of files, stored as they are: pictures do not get smaller.
export async function zip(files) {
  const [parts, index] = [[], []];
  let offset = 0;
  for (const { name, blob } of files) {
    const content = new Uint8Array(await blob.arrayBuffer());
    const label = new TextEncoder().encode(name);
    const facts = [20, 0x0800, 0, 0, YEAR_1980]; // version, names in UTF-8, stored, time, date
    const sizes = [crc32(content), content.length, content.length];
    const local = record(0x04034b50, facts, sizes, [label.length, 0]);
    index.push(record(0x02014b50, [20, ...facts], sizes, [label.length, 0, 0, 0, 0], [0, offset]), label);
    parts.push(local, label, content);
    offset += local.length + label.length + content.length;
  }
  const indexSize = index.reduce((total, { length }) => total + length, 0);
  const end = record(0x06054b50, [0, 0, files.length, files.length], [indexSize, offset], [0]);
  return new Blob([...parts, ...index, end], { type: "application/zip" });
}

// A signature and groups of little-endian numbers, of 16 and 32 bits in turn.
function record(signature, ...groups) {
  const view = new DataView(new ArrayBuffer(4 + groups.reduce((total, { length }, at) => total + length * (2 + 2 * (at % 2)), 0)));
  view.setUint32(0, signature, true);
  let place = 4;
  groups.forEach((group, at) => group.forEach((number) => {
    if (at % 2) view.setUint32(place, number, true);
    else view.setUint16(place, number, true);
    place += at % 2 ? 4 : 2;
  }));
  return new Uint8Array(view.buffer);
}
