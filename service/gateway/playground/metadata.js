// What a picture's file says of how it was made: our own JSON, or else the `parameters` of other tools.

import { findExif, readExif } from "./exif.js";
import { readTexts } from "./png.js";

const FIELDS = { // of a request, by the types that JSON has for them
  model: "string", prompt: "string", negative_prompt: "string", class_label: "string", seed: "number",
  steps: "number", guidance: "number", strength: "number", width: "number", height: "number",
};
const LINE = /^Steps: \d+, .*$/m; // the settings of `parameters`, after the prompts
const SETTING = /\s*([\w ]+): ("(?:\\.|[^"\\])+"|[^,]*)(?:,|$)/g;

// Fields of a request: those the file has, in any case one of prompt and class_label; null if it says nothing.
export async function readSettings(blob) {
  const file = new Uint8Array(await blob.arrayBuffer());
  const texts = await readTexts(file);
  const exif = texts === null ? findExif(file) : null;
  const { comment, note } = exif === null ? { comment: null, note: null } : readExif(exif);
  const [ours, theirs] = texts === null ? [note, comment] : [texts.get("patchforge"), texts.get("parameters")];
  return (ours && fromJson(ours)) ?? (theirs && fromParameters(theirs)) ?? null;
}

function fromJson(text) {
  let told;
  try { told = JSON.parse(text); } catch { return null; }
  if (told === null || typeof told !== "object") return null;
  const found = Object.fromEntries(Object.entries(FIELDS).filter(([name, kind]) => typeof told[name] === kind)
    .map(([name]) => [name, told[name]]));
  if (typeof told.sampler?.name === "string") found.sampler = told.sampler;
  return complete(found);
}

export function fromParameters(text) {
  const line = text.match(LINE);
  if (line === null) return null;
  const [prompt, negative] = text.slice(0, line.index).split(/^Negative prompt: /m).map((words) => words.trim());
  const told = Object.fromEntries([...line[0].matchAll(SETTING)].map(([, name, value]) => [name.trim(), value.trim()]));
  const found = { prompt, model: told.Model, ...(negative ? { negative_prompt: negative } : {}) };
  if (told.Sampler) found.sampler = { name: told.Sampler };
  const numbers = { seed: "Seed", steps: "Steps", guidance: "CFG scale", strength: "Denoising strength" };
  for (const [field, name] of Object.entries(numbers)) if (told[name]) found[field] = Number(told[name]);
  [found.width, found.height] = (told.Size ?? "").split("x").map(Number);
  return complete(found);
}

// Drops what is no number, and seeds that a browser cannot hold exactly.
function complete(found) {
  for (const [name, kind] of Object.entries(FIELDS)) {
    if (kind === "number" && !Number.isFinite(found[name])) delete found[name];
  }
  if (!Number.isSafeInteger(found.seed)) delete found.seed;
  if (found.height === undefined) delete found.width;
  return found.prompt || found.class_label ? found : null;
}
