// The form: what is asked for, with the limits the server states, and its refusals beside the field at fault.

import { SamplerPicker, samplersOf } from "./knobs.js";

const MOST_SEED = 2 ** 32;

const $ = (id) => document.getElementById(id);

export class Form {
  // `presets`: {name → steps and options of the adaptive sampler}, as the server's `quality` chooses them.
  constructor(root, schemas, cards, presets) {
    this.root = root;
    this.presets = new Map(Object.entries(presets));
    this.samplers = samplersOf(schemas);
    this.cards = new Map(cards.map((card) => [card.name, card]));
    this.first = new SamplerPicker($("first"), this.samplers);
    this.second = new SamplerPicker($("second"), this.samplers);
    this.limits = schemas.GenerationRequest.properties;
    for (const name of ["steps", "guidance", "n"]) this.#limit(name);
    $("model").replaceChildren(...[...this.cards.keys()].map((name) => new Option(name)));
    $("model").value = (cards.find(({ kind }) => kind === "text") ?? cards[0]).name;
    $("model").addEventListener("change", () => this.#showModel());
    $("presets").hidden = this.presets.size === 0;
    $("presets").addEventListener("change", ({ target }) => this.#choose(this.presets.get(target.value)));
    $("dice").addEventListener("click", () => { $("seed").value = randomSeed(); });
    $("compare").addEventListener("change", () => this.#showCompare());
    $("steps").addEventListener("input", () => this.#showPreset());
    root.addEventListener("input", ({ target }) => this.#forgive(target));
    root.addEventListener("change", () => this.#showPreset()); // by then a newly chosen sampler has its knobs
    this.#showModel();
  }

  get card() { return this.cards.get($("model").value); }
  get comparing() { return $("compare").checked; }

  // One request, or two that differ in their sampler alone.
  requests() {
    const { name: model, kind } = this.card;
    const subject = kind === "class" ? { class_label: $("class").value } : { prompt: $("prompt").value };
    const numbers = Object.fromEntries(["steps", "guidance", "n"].map((name) => [name, Number($(name).value)]));
    const request = { model, ...subject, ...numbers, sampler: this.first.read() };
    if ($("seed").value !== "") request.seed = Number($("seed").value);
    if (!this.comparing) return [request];
    const seed = request.seed ?? randomSeed();
    return [{ ...request, seed }, { ...request, seed, sampler: this.second.read() }];
  }

  titles(runs) {
    return runs.map(({ request: { sampler: { name } } }) => this.samplers.get(name)?.title ?? name);
  }

  // Shows a past request again, the second sampler of a comparison too.
  fill([request, other]) {
    if (this.cards.has(request.model)) $("model").value = request.model;
    this.#showModel();
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

  #limit(name) {
    const property = this.limits[name];
    const { minimum, maximum } = property.anyOf?.find(({ type }) => type !== "null") ?? property;
    Object.assign($(name), { min: minimum, max: maximum });
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
    this.#showPreset();
  }

  #showCompare() {
    $("second").hidden = !this.comparing;
    if (!this.comparing) return;
    const others = [...this.samplers.keys()].filter((name) => name !== this.first.select.value);
    this.second.show({ name: others[0] });
  }

  #choose({ steps, ...options }) {
    const { sampler } = this.card;
    $("steps").value = steps;
    this.first.show({ ...(sampler.name === "adaptive" ? sampler : { name: "adaptive" }), ...options });
    this.#showPreset();
  }

  #showPreset() {
    const shown = { ...this.first.read(), steps: Number($("steps").value) };
    for (const radio of $("presets").querySelectorAll("input")) {
      const wanted = Object.entries(this.presets.get(radio.value) ?? {});
      radio.checked = shown.name === "adaptive" && wanted.every(([key, value]) => shown[key] === value);
    }
  }
}

const randomSeed = () => Math.floor(Math.random() * MOST_SEED);
