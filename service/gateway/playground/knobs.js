// The settings ("knobs") of each sampler, built from the server's OpenAPI document: new samplers appear automatically.

const CROWDED = 20; // a slider whose default is nearer to its start than 1/20 of the range is logarithmic
const PAPER = / \(paper: [^)]*\)/; // a note for developers
const STOPS = 100; // positions of a slider over real numbers

// Maps each sampler's name to {name, title, about, knobs}, in the order of the OpenAPI schemas.
export function samplersOf(schemas) {
  const union = schemas.GenerationRequest.properties.sampler.anyOf.find(({ oneOf }) => oneOf);
  const found = union.oneOf.map(({ $ref }) => schemas[$ref.split("/").at(-1)]).map((schema) => {
    const { name, ...properties } = schema.properties;
    return {
      name: name.const,
      title: sentence(name.const),
      about: plain(schema.description ?? ""),
      knobs: Object.entries(properties).map(([key, property]) => knob(key, property)),
    };
  });
  return new Map(found.map((sampler) => [sampler.name, sampler]));
}

function knob(name, property) {
  const known = property.anyOf?.find(({ type }) => type !== "null") ?? property;
  return {
    name,
    title: sentence(name),
    about: plain(property.description ?? ""),
    kind: known.enum ? "choice" : known.type,
    choices: known.enum ?? [],
    least: known.minimum ?? known.exclusiveMinimum,
    most: known.maximum ?? known.exclusiveMaximum,
    standard: property.default,
    optional: known !== property,
  };
}

// Whether two samplers are the same. The server leaves some knobs out where they are 0.
export function agree(one, other) {
  return Object.keys({ ...one, ...other }).every((knob) => (one[knob] ?? 0) === (other[knob] ?? 0));
}

const sentence = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");
const plain = (text) => text.split("\n\n")[0].replaceAll("`", "").replaceAll(/[\n_]/g, " ").replace(PAPER, "");

// Chooses a sampler and its knobs, inside `root`: a <select>, a description and a <fieldset>.
export class SamplerPicker {
  constructor(root, samplers) {
    this.root = root;
    this.samplers = samplers;
    this.select = root.querySelector("select");
    this.select.replaceChildren(...[...samplers.values()].map(({ name, title }) => new Option(title, name)));
    this.select.addEventListener("change", () => this.show({ name: this.select.value }));
  }

  get allowed() { return [...this.select.options].filter(({ disabled }) => !disabled).map(({ value }) => value); }

  // Disables all samplers except `names`; null enables all.
  allow(names) {
    for (const option of this.select.options) option.disabled = names !== null && !names.includes(option.value);
  }

  show({ name, ...values }) {
    const { about, knobs } = this.samplers.get(name);
    this.select.value = name;
    this.root.querySelector(".about").textContent = about;
    const fieldset = this.root.querySelector("fieldset");
    fieldset.hidden = knobs.length === 0;
    const rows = knobs.map((each) => row(each, values[each.name] ?? each.standard, this.root.id));
    fieldset.replaceChildren(fieldset.querySelector("legend"), ...rows);
  }

  read() {
    const sampler = { name: this.select.value };
    for (const { name, kind, optional } of this.samplers.get(sampler.name).knobs) {
      const input = this.root.querySelector(`[data-field="sampler.${name}"]`);
      if (kind === "boolean") sampler[name] = input.checked;
      else if (kind === "choice" || kind === "string") sampler[name] = input.value;
      else if (input.value !== "" || !optional) sampler[name] = Number(input.value);
    }
    return sampler;
  }
}

function row({ name, title, about, kind, ...rest }, value, prefix) {
  const id = `${prefix}-${name}`;
  const input = kind === "choice" ? choice(rest.choices) : document.createElement("input");
  Object.assign(input, { id });
  input.dataset.field = `sampler.${name}`;
  const label = Object.assign(document.createElement("label"), { htmlFor: id, textContent: title });
  const made = document.createElement("div");
  made.className = "knob";
  made.append(label, input);
  if (kind === "boolean") Object.assign(input, { type: "checkbox", checked: value ?? false });
  else if (kind === "number" || kind === "integer") made.append(...numeric(input, kind, rest, value, title));
  else input.value = value ?? "";
  if (about) {
    const hint = Object.assign(document.createElement("p"), { id: `${id}-about`, className: "hint" });
    hint.textContent = about;
    input.setAttribute("aria-describedby", hint.id);
    made.append(hint);
  }
  return made;
}

function choice(choices) {
  const select = document.createElement("select");
  select.replaceChildren(...choices.map((word) => new Option(word)));
  return select;
}

// A number input and, if both limits are known, a slider that follows it.
function numeric(input, kind, { least, most, optional }, value, title) {
  const step = kind === "integer" ? 1 : "any";
  Object.assign(input, { type: "number", step, min: least ?? "", max: most ?? "", required: !optional });
  input.value = value ?? "";
  if (least === undefined || most === undefined) return [];
  const scale = scaleOf(least, most, kind, value);
  const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: scale.stops });
  slider.setAttribute("aria-label", `${title}, slider`);
  slider.tabIndex = -1; // the number input has the same arrow keys; one tab stop per knob is enough
  const follow = () => { slider.value = scale.place(Number(input.value)); };
  input.addEventListener("input", follow);
  slider.addEventListener("input", () => {
    input.value = scale.value(Number(slider.value));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  follow();
  return [slider];
}

function scaleOf(least, most, kind, value) {
  if (kind === "integer") return { stops: most - least, place: (v) => v - least, value: (at) => least + at };
  const low = least > 0 ? least : Math.min(value ?? most, most) / CROWDED;
  if (least >= 0 && value > 0 && (value - least) / (most - least) < 1 / CROWDED) {
    const span = Math.log(most / low);
    return {
      stops: STOPS,
      place: (v) => (STOPS * Math.log(Math.max(v, low) / low)) / span,
      value: (at) => Number((low * Math.exp((span * at) / STOPS)).toPrecision(2)),
    };
  }
  const stride = (most - least) / STOPS;
  return { stops: STOPS, place: (v) => (v - least) / stride, value: (at) => Number((least + at * stride).toFixed(4)) };
}
