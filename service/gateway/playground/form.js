// The form: what is asked for, with the limits the server states, and its refusals beside the field at fault.

import { SamplerPicker, samplersOf } from "./knobs.js";
import { SizePicker } from "./size.js";
import { base64, SourcePicker, STARTERS } from "./source.js";

const MOST_SEED = 2 ** 32;

const $ = (id) => document.getElementById(id);

export class Form {
  constructor(root, schemas, cards) {
    this.root = root;
    this.samplers = samplersOf(schemas);
    this.cards = new Map(cards.map((card) => [card.name, card]));
    this.first = new SamplerPicker($("first"), this.samplers);
    this.second = new SamplerPicker($("second"), this.samplers);
    this.schema = schemas.GenerationRequest.properties;
    for (const name of ["steps", "guidance", "n"]) Object.assign($(name), this.#limits(name, "min", "max"));
    this.size = new SizePicker(this.#limits("width", "minimum", "maximum"));
    this.source = new SourcePicker(root);
    this.source.addEventListener("change", () => this.#showSource());
    $("model").replaceChildren(...[...this.cards.keys()].map((name) => new Option(name)));
    $("model").value = (cards.find(({ kind }) => kind === "text") ?? cards[0]).name;
    $("model").addEventListener("change", () => this.#showModel());
    $("presets").addEventListener("change", ({ target }) => this.#choose(this.card.presets[target.value]));
    $("dice").addEventListener("click", () => { $("seed").value = randomSeed(); });
    $("compare").addEventListener("change", () => this.#showCompare());
    $("steps").addEventListener("input", () => this.#showPreset());
    root.addEventListener("input", ({ target }) => this.#forgive(target));
    root.addEventListener("change", () => this.#showPreset()); // by then a newly chosen sampler has its knobs
    this.#showModel();
  }

  get card() { return this.cards.get($("model").value); }
  get comparing() { return $("compare").checked; }

  // One request, or two that differ in their sampler alone, and what both start from: see SourcePicker.read.
  async requests() {
    const source = await this.source.read();
    const { name: model, kind } = this.card;
    const subject = kind === "class" ? { class_label: $("class").value } : { prompt: $("prompt").value };
    const numbers = Object.fromEntries(["steps", "guidance", "n"].map((name) => [name, Number($(name).value)]));
    const request = { model, ...subject, ...numbers, sampler: this.first.read(), ...this.size.read() };
    if ($("seed").value !== "") request.seed = Number($("seed").value);
    if (source) Object.assign(request, { image: await base64(source.image), strength: this.source.strength });
    if (source?.mask) request.mask = await base64(source.mask);
    if (!this.comparing) return { requests: [request], source };
    const seed = request.seed ?? randomSeed();
    return { requests: [{ ...request, seed }, { ...request, seed, sampler: this.second.read() }], source };
  }

  titles(runs) {
    return runs.map(({ request: { sampler: { name } } }) => this.samplers.get(name)?.title ?? name);
  }

  // Shows a past request again, the second sampler of a comparison too, and what they started from.
  async fill([request, other], source) {
    if (this.cards.has(request.model)) $("model").value = request.model;
    this.#showModel();
    if (source) await this.source.take(source.image, { marked: source.marked, strength: request.strength });
    else this.source.clear();
    this.size.show(request, this.source.size);
    $("prompt").value = request.prompt ?? "";
    $("class").value = request.class_label ?? "";
    for (const name of ["steps", "guidance", "n", "seed"]) $(name).value = request[name];
    $("compare").checked = other !== undefined;
    this.#showCompare();
    if (this.samplers.has(request.sampler.name)) this.first.show(request.sampler);
    if (other && this.samplers.has(other.sampler.name)) this.second.show(other.sampler);
    this.#showPreset();
  }

  // A refusal beside its field, which takes the focus; where no field is at fault, by itself.
  refuse({ field, message }, which = 0) {
    const wanted = `[data-field="${CSS.escape(field ?? "")}"]`;
    const input = (which === 1 && $("second").querySelector(wanted)) || this.root.querySelector(wanted);
    $("problem").textContent = field && !input ? `${field}: ${message}` : message;
    if (!input) return;
    const name = document.querySelector(`label[for="${input.id}"]`)?.textContent.trim() ?? field;
    $("problem").textContent = `${name}: ${message}`;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", "problem");
    const fault = Object.assign(document.createElement("p"), { className: "fault", textContent: message });
    fault.setAttribute("aria-hidden", "true"); // said already, by the alert at the end of the form
    input.closest(".field, .knob").append(fault);
    input.focus();
  }

  forgiveAll() {
    $("problem").textContent = "";
    for (const input of this.root.querySelectorAll("[aria-invalid]")) this.#forgive(input);
  }

  #forgive(input) {
    if (!input.hasAttribute("aria-invalid")) return;
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
    input.closest(".field, .knob").querySelector(".fault")?.remove();
    $("problem").textContent = "";
  }

  // What the server says of a number, under the names that are wanted.
  #limits(name, least, most) {
    const property = this.schema[name];
    const { minimum, maximum } = property.anyOf?.find(({ type }) => type !== "null") ?? property;
    return { [least]: minimum, [most]: maximum };
  }

  #showModel() {
    const { kind, classes, width, height, grid, description, steps, guidance, sampler } = this.card;
    const byClass = kind === "class";
    $("class-row").hidden = !byClass;
    $("prompt-row").hidden = byClass;
    $("class").required = byClass;
    $("prompt").required = !byClass;
    $("classes").replaceChildren(...classes.map((name) => new Option(name)));
    $("about").textContent = `${width} × ${height} pixels in ${grid[0] * grid[1]} patches. ${description}`;
    $("steps").value = steps;
    $("guidance").value = guidance;
    this.first.show(sampler);
    this.source.card = this.card;
    this.#showSource();
    this.#showPreset();
  }

  // With a picture to start from, only some samplers will do, and the picture's own size is the usual one.
  #showSource() {
    this.size.offer(this.card, this.source.size);
    const names = this.source.size ? STARTERS : null;
    for (const picker of [this.first, this.second]) picker.allow(names);
    if (names && !names.includes(this.first.select.value)) {
      this.#choose(this.card.presets.standard);
    }
    if (this.comparing) this.#showCompare();
  }

  #showCompare() {
    $("second").hidden = !this.comparing;
    if (!this.comparing) return;
    const others = this.second.allowed.filter((name) => name !== this.first.select.value);
    this.second.show({ name: others[0] ?? this.first.select.value });
  }

  #choose({ steps, sampler }) {
    $("steps").value = steps;
    this.first.show(sampler);
    this.#showPreset();
  }

  #showPreset() {
    const shown = { ...this.first.read(), steps: Number($("steps").value) };
    for (const radio of $("presets").querySelectorAll("input")) {
      const { sampler, steps } = this.card.presets[radio.value];
      radio.checked = Object.entries({ ...sampler, steps }).every(([key, value]) => shown[key] === value);
    }
  }
}

const randomSeed = () => Math.floor(Math.random() * MOST_SEED);
