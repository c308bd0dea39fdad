// The code that makes the pictures on the stage again, and the files it reads.

import * as snippets from "./snippets.js";

const GRPC_PORT = 50051;

const $ = (id) => document.getElementById(id);

export class Code {
  #runs = [];

  constructor() {
    this.server = { grpc_port: null };
    this.key = false; // whether the server requires an API key
    $("snippets").addEventListener("change", () => { $("copied").textContent = ""; this.#showText(); });
    $("copy").addEventListener("click", () => this.#copy());
  }

  show(runs) {
    this.#runs = runs;
    $("snippets").hidden = false;
    this.#showText();
    this.#showFiles();
  }

  #showText() {
    const kind = document.querySelector('[name="snippet"]:checked').value;
    const at = {
      http: location.origin + location.pathname.replace(/\/$/, ""),
      grpc: `${location.hostname}:${this.server.grpc_port ?? GRPC_PORT}`,
      secure: location.protocol === "https:",
      key: this.key,
    };
    $("code").textContent = this.#runs.map(({ request }) => snippets[kind](request, at)).join("\n");
  }

  // Offers the files that the code reads.
  #showFiles() {
    const { source } = this.#runs[0];
    $("files").hidden = !source;
    for (const link of $("files").querySelectorAll("a")) URL.revokeObjectURL(link.href);
    if (!source) return;
    const [image, mask] = $("files").querySelectorAll("a");
    image.href = URL.createObjectURL(source.image);
    mask.parentElement.hidden = !source.mask;
    if (source.mask) mask.href = URL.createObjectURL(source.mask);
  }

  async #copy() {
    getSelection().selectAllChildren($("code")); // without clipboard access, Ctrl-C copies the selection
    try {
      await navigator.clipboard.writeText($("code").textContent);
      $("copied").textContent = "Copied";
    } catch {
      $("copied").textContent = "Selected: press Ctrl-C to copy";
    }
  }
}
