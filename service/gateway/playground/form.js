// The form: builds requests, takes its limits from the server, and shows errors beside their fields.

import { agree, SamplerPicker, samplersOf } from "./knobs.js";
import { ModelPanel } from "./models.js";
import { drawnGrid, SizePicker } from "./size.js";
import { base64, SourcePicker, STARTERS } from "./source.js";

const MOST_SEED = 2 ** 32;
const PREVIEWS = 2; // of each picture, if there are several

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
    this.panel = new ModelPanel();
    this.source = new SourcePicker();
    this.source.addEventListener("change", () => this.#showSource());
    for (const name of ["size", "width", "height"]) $(name).addEventListener("change", () => this.#showFrame());
    $("model").replaceChildren(...[...this.cards.keys()].map((name) => new Option(name)));
    $("model").value = (cards.find(({ kind }) => kind === "text") ?? cards[0]).name;
    $("model").addEventListener("change", () => this.#showModel());
    $("presets").addEventListener("change", ({ target }) => this.#choose(this.card.presets[target.value]));
    $("dice").addEventListener("click", () => {
      $("seed").value = randomSeed();
      $("seed").dispatchEvent(new Event("change", { bubbles: true }));
    });
    $("compare").addEventListener("change", () => this.#showCompare());
    $("steps").addEventListener("input", () => this.#showPreset());
    root.addEventListener("input", ({ target }) => this.#forgive(target));
    root.addEventListener("invalid", ({ target }) => reveal(target), true); // the browser cannot point at what is folded
    root.addEventListener("change", () => this.#showPreset()); // a newly chosen sampler has its knobs by then
    this.#showModel();
  }

  get card() { return this.cards.get($("model").value); }
  get comparing() { return $("compare").checked; }

  // One request, or two that differ only in the sampler; and what they start from: see SourcePicker.read.
  async requests() {
    const source = await this.source.read();
    const { name: model, kind } = this.card;
    const subject = this.#subject(kind);
    const numbers = Object.fromEntries(["steps", "guidance", "n"].map((name) => [name, Number($(name).value)]));
    const request = { model, ...subject, ...numbers, sampler: this.first.read(), ...this.size.read() };
    if (request.n > 1) request.partial_images = PREVIEWS; // else a busy server may show some of the pictures only
    if ($("seed").value !== "") request.seed = Number($("seed").value);
    if (source) Object.assign(request, { image: await base64(source.image), strength: this.source.strength });
    if (source?.mask) request.mask = await base64(source.mask);
    if (!this.comparing) return { requests: [request], source };
    const seed = request.seed ?? randomSeed();
    return { requests: [{ ...request, seed }, { ...request, seed, sampler: this.second.read() }], source };
  }

  // The state of the form as one request or two, for a link: without what is the model's default, and unchecked.
  draft() {
    const { name: model, kind, sampler, ...card } = this.card;
    const request = { model, ...this.#subject(kind), ...this.size.read() };
    const usual = { n: 1, seed: null, steps: card.steps, guidance: card.guidance };
    for (const [field, value] of Object.entries(usual)) {
      if ($(field).value !== "" && Number($(field).value) !== value) request[field] = Number($(field).value);
    }
    const first = this.first.read();
    if (!agree(first, sampler)) request.sampler = first;
    return this.comparing ? [request, { ...request, sampler: this.second.read() }] : [request];
  }

  #subject(kind) {
    if (kind === "class") return { class_label: $("class").value };
    const negative = $("negative").value;
    return { prompt: $("prompt").value, ...(negative ? { negative_prompt: negative } : {}) };
  }

  // The samplers' names, numbered if two runs have the same one.
  titles(runs) {
    const titles = runs.map(({ request: { sampler: { name } } }) => this.samplers.get(name)?.title ?? name);
    return new Set(titles).size < titles.length ? titles.map((title, index) => `${title} ${index + 1}`) : titles;
  }

  // Fills the form from a request, with the second sampler of a comparison and what they started from. What the request
  // leaves out is the model's default.
  async fill([request, other], source = null) {
    $("model").value = this.#modelFor(request).name;
    $("prompt").value = request.prompt ?? "";
    $("class").value = request.class_label ?? "";
    $("negative").value = request.negative_prompt ?? "";
    this.#showModel();
    if (source) await this.source.take(source.image, { strength: request.strength });
    else this.source.clear();
    this.size.show(request);
    this.#showFrame();
    if (source) this.source.mask.mark(source.marked);
    const preset = this.card.presets[request.quality];
    if (preset) this.#choose(preset);
    if (this.samplers.has(request.sampler?.name)) this.first.show(request.sampler);
    for (const name of ["steps", "guidance"]) $(name).value = request[name] ?? $(name).value;
    $("n").value = request.n ?? 1;
    $("seed").value = request.seed ?? "";
    $("compare").checked = other !== undefined;
    this.#showCompare();
    if (this.samplers.has(other?.sampler.name)) this.second.show(other.sampler);
    this.#showPreset();
  }

  // The model a request names, or else one that can draw its subject.
  #modelFor({ model, class_label: label }) {
    const cards = [...this.cards.values()];
    const able = label ? cards.find(({ classes }) => classes.includes(label)) : cards.find(({ kind }) => kind === "text");
    return this.cards.get(model) ?? able ?? this.card;
  }

  // Shows an error, and beside its field if it has one, which gets the focus.
  refuse({ field, message }, which = 0) {
    const wanted = `[data-field="${CSS.escape(field ?? "")}"]`;
    const input = (which === 1 && $("second").querySelector(wanted)) || document.querySelector(wanted);
    $("problem").textContent = field && !input ? `${field}: ${message}` : message;
    if (!input) return;
    const name = document.querySelector(`label[for="${input.id}"]`)?.textContent.trim() ?? field;
    $("problem").textContent = `${name}: ${message}`;
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", "problem");
    const fault = Object.assign(document.createElement("p"), { className: "fault", textContent: message });
    fault.setAttribute("aria-hidden", "true"); // the alert says it already
    input.closest(".field, .knob")?.append(fault);
    reveal(input);
    input.focus();
  }

  forgiveAll() {
    $("problem").textContent = "";
    for (const input of document.querySelectorAll("[aria-invalid]")) this.#forgive(input);
  }

  #forgive(input) {
    if (!input.hasAttribute("aria-invalid")) return;
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
    input.closest(".field, .knob")?.querySelector(".fault")?.remove();
    $("problem").textContent = "";
  }

  // The server's limits of a number, under the names `least` and `most`.
  #limits(name, least, most) {
    const property = this.schema[name];
    const { minimum, maximum } = property.anyOf?.find(({ type }) => type !== "null") ?? property;
    return { [least]: minimum, [most]: maximum };
  }

  #showModel() {
    const { steps, guidance, sampler } = this.card;
    this.panel.show(this.card);
    $("steps").value = steps;
    $("guidance").value = guidance;
    this.first.show(sampler);
    this.#showSource();
    this.#showPreset();
  }

  // With a picture to start from, only some samplers work, and the default size is the picture's own.
  #showSource() {
    this.size.offer(this.card, this.source.size);
    this.#showFrame();
    const names = this.source.size ? STARTERS : null;
    for (const picker of [this.first, this.second]) picker.allow(names);
    if (names && !names.includes(this.first.select.value)) {
      this.#choose(this.card.presets.standard);
    }
    if (this.comparing) this.#showCompare();
  }

  // Painting is on the patches of which the finished picture is drawn.
  #showFrame() {
    const asked = this.size.asked;
    this.source.mask.fit({ ...asked, grid: drawnGrid(this.card, asked) });
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
    const shown = this.first.read();
    for (const radio of $("presets").querySelectorAll("input")) {
      const { sampler, steps } = this.card.presets[radio.value];
      radio.checked = steps === Number($("steps").value) && agree(shown, sampler);
    }
  }
}

// Unfolds what hides an input.
function reveal(input) {
  const folded = input.closest("details");
  if (folded) folded.open = true;
}

const randomSeed = () => Math.floor(Math.random() * MOST_SEED);
