// The form's state as the part of the address after #, so that a link or a reload brings it back.

const TEXTS = ["model", "prompt", "negative_prompt", "class_label"];
const NUMBERS = ["n", "seed", "steps", "guidance", "width", "height", "strength"];
const SECOND = "versus"; // the second sampler of a comparison

// `requests` is one request, or two that differ in the sampler.
export function toHash([request, other]) {
  const parts = new URLSearchParams();
  for (const name of [...TEXTS, "quality", ...NUMBERS]) {
    if (request[name] !== undefined && request[name] !== "") parts.set(name, request[name]);
  }
  if (request.sampler) addSampler(parts, "sampler", request.sampler);
  if (other) addSampler(parts, SECOND, other.sampler);
  return parts.toString();
}

function addSampler(parts, key, { name, ...knobs }) {
  parts.set(key, name);
  for (const [knob, value] of Object.entries(knobs)) if (value !== null) parts.set(`${key}.${knob}`, value);
}

// What `toHash` was given, as far as the text has it: whoever writes a link may leave out anything. Null without any.
export function fromHash(text) {
  const parts = new URLSearchParams(text.replace(/^#/, ""));
  const request = {};
  for (const name of [...TEXTS, "quality"]) if (parts.has(name)) request[name] = parts.get(name);
  for (const name of NUMBERS) {
    const value = Number(parts.get(name) ?? NaN);
    if (Number.isFinite(value)) request[name] = value;
  }
  const [sampler, versus] = ["sampler", SECOND].map((key) => readSampler(parts, key));
  if (sampler) request.sampler = sampler;
  if (Object.keys(request).length === 0) return null;
  return versus ? [request, { ...request, sampler: versus }] : [request];
}

function readSampler(parts, key) {
  if (!parts.get(key)) return null;
  const knobs = [...parts].filter(([name]) => name.startsWith(`${key}.`))
    .map(([name, value]) => [name.slice(key.length + 1), valueOf(value)]);
  return { name: parts.get(key), ...Object.fromEntries(knobs) };
}

function valueOf(text) {
  if (text === "true" || text === "false") return text === "true";
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}
