// Past generations, kept in this browser alone, the oldest dropped when there are too many or they grow too big.

const [DATABASE, STORE] = ["patchforge", "generations"];
const MOST = 48;
const MOST_BYTES = 64 * 2 ** 20;

export class History {
  #database = null;

  static async open() {
    const history = new History();
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "key" });
    history.#database = await settled(request);
    return history;
  }

  // Newest first: {key, at, titles, runs}, the runs as `Run.record` gives them.
  async all() { return (await settled(this.#store("readonly").getAll())).reverse(); }

  async add(titles, runs) {
    const at = Date.now();
    await settled(this.#store().put({ key: `${String(at).padStart(15, "0")}-${runs[0].id}`, at, titles, runs }));
    await this.#trim();
  }

  async remove(key) { await settled(this.#store().delete(key)); }
  async clear() { await settled(this.#store().clear()); }

  async #trim() {
    let [kept, bytes] = [0, 0];
    for (const { key, runs } of await this.all()) {
      kept += 1;
      bytes += runs.flatMap(({ pictures }) => pictures.flatMap(({ frames }) => frames))
        .reduce((total, { blob }) => total + blob.size, runs[0].source?.image.size ?? 0);
      if (kept > MOST || (bytes > MOST_BYTES && kept > 1)) await this.remove(key);
    }
  }

  #store(mode = "readwrite") { return this.#database.transaction(STORE, mode).objectStore(STORE); }
}

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

// The row of past generations under the stage.
export class Shelf {
  #urls = [];

  constructor(root, history, onPick) {
    this.root = root;
    this.list = root.querySelector("ol");
    this.history = history;
    this.onPick = onPick;
    root.querySelector("#forget").addEventListener("click", async () => {
      await history.clear();
      await this.refresh();
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
    const { request } = entry.runs[0];
    const words = request.prompt ?? request.class_label;
    const item = document.createElement("li");
    const pick = Object.assign(document.createElement("button"), { type: "button", className: "pick", title: words });
    pick.append(...entry.runs.map((run) => this.#thumbnail(run)));
    pick.setAttribute("aria-label", `${words}, ${entry.titles.join(" and ")}, seed ${request.seed}`);
    pick.addEventListener("click", () => this.onPick(entry));
    const remove = Object.assign(document.createElement("button"), { type: "button", className: "remove" });
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${words}`);
    remove.addEventListener("click", async () => {
      await this.history.remove(entry.key);
      await this.refresh();
      (this.list.querySelector("button") ?? document.getElementById("generate")).focus();
    });
    const caption = Object.assign(document.createElement("span"), { textContent: words });
    item.append(pick, remove, caption);
    return item;
  }

  #thumbnail({ pictures }) {
    const url = URL.createObjectURL(pictures[0].final);
    this.#urls.push(url);
    return Object.assign(new Image(), { src: url, alt: "" });
  }
}
