// What the chosen model draws: in words, as example prompts, or as classes to pick from.

const MOST_SHOWN = 60; // classes at once; typing finds the others

const $ = (id) => document.getElementById(id);
const named = (name) => name.replaceAll(/[-_]/g, " ");
const same = (name) => named(name.toLowerCase());
const usual = (name) => named(name.split(",")[0]); // of a class with several names, such as "tench, Tinca tinca"

export class ModelPanel {
  #card = null;

  constructor() {
    $("examples").addEventListener("click", ({ target }) => this.#pick(target, $("prompt")));
    $("class-picker").addEventListener("click", ({ target }) => this.#pick(target, $("class")));
    $("class").addEventListener("input", () => this.#showClasses());
  }

  show(card) {
    this.#card = card;
    const byClass = card.kind === "class";
    $("class-row").hidden = !byClass;
    $("prompt-row").hidden = byClass;
    $("class").required = byClass;
    $("prompt").required = !byClass;
    const examples = card.examples ?? [];
    $("prompt").placeholder = examples[0] ?? "What should the picture show?";
    $("examples").replaceChildren(...examples.map((prompt) => chip(prompt, prompt, { tabs: true })));
    $("examples").hidden = examples.length === 0;
    $("classes").replaceChildren(...card.classes.map((name) => new Option(name)));
    $("draws").textContent = draws(card);
    $("about").textContent = [card.description, `Licence: ${card.licence}`].filter(Boolean).join(". ");
    this.#showClasses();
  }

  // Classes that contain what was typed; all of them once a class is complete.
  #showClasses() {
    const { classes } = this.#card;
    const typed = $("class").value;
    const fitting = classes.includes(typed) ? classes : classes.filter((name) => same(name).includes(same(typed)));
    const chips = fitting.slice(0, MOST_SHOWN).map((name) => chip(name, usual(name), { chosen: name === typed }));
    $("class-picker").replaceChildren(...chips);
  }

  #pick(button, input) {
    if (button.value === undefined || button.tagName !== "BUTTON") return;
    input.value = button.value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }
}

function chip(value, text, { chosen = false, tabs = false }) {
  const item = document.createElement("li");
  const button = Object.assign(document.createElement("button"), { type: "button", value, textContent: text });
  if (!tabs) button.tabIndex = -1; // typing does the same, and dozens of tab stops would be in the way
  button.setAttribute("aria-pressed", String(chosen));
  item.append(button);
  return item;
}

function draws({ kind, classes, width, height, grid, sizes = [] }) {
  const what = kind === "class" ? `one of ${classes.length} classes` : "what the prompt says";
  const pixels = ([across, down]) => `${across}\u00a0×\u00a0${down}`;
  const others = sizes.length > 0 ? ` Also at ${sizes.map(pixels).join(", ")}.` : "";
  return `Draws ${what} at ${pixels([width, height])} pixels, in ${grid[0] * grid[1]} patches.${others}`;
}
