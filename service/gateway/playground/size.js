// Chooses the size of the finished picture: the default, another that the model draws itself, a multiple of the model's
// own, or any other.

const MULTIPLES = [2, 4, 8];
const MOST_PIXELS = 2 ** 21; // the server's limit; the server itself checks sizes that the user types
const [DEFAULT, OTHER] = ["", "other"];

const $ = (id) => document.getElementById(id);
const words = ({ width, height }) => `${width} × ${height}`;

export class SizePicker {
  // `limits` is {minimum, maximum} of a side.
  constructor(limits) {
    this.limits = limits;
    for (const side of ["width", "height"]) Object.assign($(side), { min: limits.minimum, max: limits.maximum });
    $("size").addEventListener("change", () => this.#showOther());
  }

  // Offers sizes for a model, or for `source`, the size of the picture to start from. Keeps the choice if possible.
  offer({ width, height, sizes: natives = [] }, source) {
    const before = $("size").value;
    const sizes = MULTIPLES.map((times) => ({ width: times * width, height: times * height })).filter((size) =>
      Math.max(size.width, size.height) <= this.limits.maximum && size.width * size.height <= MOST_PIXELS);
    this.usual = words(source ?? { width, height });
    const own = natives.map(([across, down]) => words({ width: across, height: down })).filter((size) => size !== this.usual);
    const others = sizes.map(words).filter((size) => size !== this.usual);
    $("size").replaceChildren(
      new Option(this.usual, DEFAULT), ...own.map((size) => new Option(size)),
      ...others.map((size) => new Option(`${size}, enlarged`, size)), new Option("Other…", OTHER));
    if ([...$("size").options].some(({ value }) => value === before)) $("size").value = before;
    this.#showOther();
  }

  read() {
    if ($("size").value === DEFAULT) return {};
    if ($("size").value === OTHER) return { width: Number($("width").value), height: Number($("height").value) };
    const [width, height] = $("size").value.split(" × ").map(Number);
    return { width, height };
  }

  // Shows the size of a past request.
  show({ width, height }) {
    const isDefault = width == null || words({ width, height }) === this.usual;
    const listed = [...$("size").options].some(({ value }) => value === words({ width, height }));
    $("size").value = isDefault ? DEFAULT : listed ? words({ width, height }) : OTHER;
    if ($("size").value === OTHER) [$("width").value, $("height").value] = [width, height];
    this.#showOther();
  }

  #showOther() {
    const other = $("size").value === OTHER;
    $("other-size").hidden = !other;
    for (const side of ["width", "height"]) Object.assign($(side), { required: other, disabled: !other });
  }
}
