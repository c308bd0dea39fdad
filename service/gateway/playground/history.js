// Past generations, stored in this browser only. The oldest are dropped when there are too many, or they need too much
// space.

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

  // Newest first: {key, at, titles, runs}, with runs from `Run.record`.
  async all() { return (await settled(this.#store("readonly").getAll())).reverse(); }

  async add(titles, runs) {
    const at = Date.now();
    const key = `${String(at).padStart(15, "0")}-${runs[0].id}`;
    await settled(this.#store().put({ key, at, titles, runs }));
    await this.#trim();
    return key;
  }

  async get(key) { return settled(this.#store("readonly").get(key)); }
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
