// The pictures made in this browser, below the stage: to look at again, to save, or to remove.

import { saveAll } from "./files.js";

export class Gallery {
  #urls = [];

  // `onPick(entry)` is called when an entry is chosen.
  constructor(root, history, onPick) {
    this.root = root;
    this.list = root.querySelector("ol");
    this.history = history;
    this.onPick = onPick;
    root.querySelector("#forget").addEventListener("click", async () => {
      await history.clear();
      await this.refresh();
    });
    root.querySelector("#save-all").addEventListener("click", async () => {
      await saveAll((await history.all()).flatMap(({ runs }) => runs), "patchforge-pictures");
    });
  }

  async refresh() {
    const entries = await this.history.all();
    for (const url of this.#urls) URL.revokeObjectURL(url);
    this.#urls = [];
    this.root.hidden = entries.length === 0;
    this.list.replaceChildren(...entries.map((entry) => this.#item(entry)));
  }

  #item(entry) {
    const { request, pictures } = entry.runs[0];
    const words = request.prompt ?? request.class_label;
    const item = document.createElement("li");
    const pick = Object.assign(document.createElement("button"), { type: "button", className: "pick", title: words });
    pick.append(...entry.runs.map((run) => this.#thumbnail(run)));
    if (pictures.length > 1) pick.append(Object.assign(document.createElement("b"), { textContent: pictures.length }));
    pick.setAttribute("aria-label", `${words}, ${entry.titles.join(" and ")}, seed ${request.seed}`);
    pick.addEventListener("click", () => this.onPick(entry));
    const caption = Object.assign(document.createElement("span"), { textContent: words });
    item.append(pick, this.#saver(entry, words), this.#remover(entry, words), caption);
    return item;
  }

  #saver(entry, words) {
    const save = corner("save", "↓", `Download ${words}`);
    save.addEventListener("click", () => saveAll(entry.runs, words.slice(0, 60)));
    return save;
  }

  #remover(entry, words) {
    const remove = corner("remove", "×", `Remove ${words}`);
    remove.addEventListener("click", async () => {
      await this.history.remove(entry.key);
      await this.refresh();
      (this.list.querySelector("button") ?? document.getElementById("generate")).focus();
    });
    return remove;
  }

  #thumbnail({ pictures }) {
    const url = URL.createObjectURL(pictures[0].final);
    this.#urls.push(url);
    return Object.assign(new Image(), { src: url, alt: "" });
  }
}

function corner(className, textContent, label) {
  const button = Object.assign(document.createElement("button"), { type: "button", className, textContent, title: label });
  button.setAttribute("aria-label", label);
  return button;
}
