// How large the finished picture is to be: as it comes, a multiple of the model's own size, or as someone says.

const MULTIPLES = [2, 4, 8];
const MOST_PIXELS = 2 ** 21; // what the server makes; a size that someone types is refused by itself
const [AS_IT_COMES, OTHER] = ["", "other"];

const $ = (id) => document.getElementById(id);
const words = ({ width, height }) => `${width} × ${height}`;

export class SizePicker {
  // `limits`: {minimum, maximum} of a side.
  constructor(limits) {
    this.limits = limits;
    for (const side of ["width", "height"]) Object.assign($(side), { min: limits.minimum, max: limits.maximum });
    $("size").addEventListener("change", () => this.#showOther());
  }

  // The choices for a model's pictures, or for a picture to start from; what was chosen stays, if it is among them.
  offer({ width, height }, source) {
    const before = $("size").value;
    const sizes = MULTIPLES.map((times) => ({ width: times * width, height: times * height })).filter((size) =>
      Math.max(size.width, size.height) <= this.limits.maximum && size.width * size.height <= MOST_PIXELS);
    const usual = words(source ?? { width, height });
    const others = sizes.map(words).filter((size) => size !== usual);
    $("size").replaceChildren(
      new Option(usual, AS_IT_COMES), ...others.map((size) => new Option(size)), new Option("Other…", OTHER));
    if ([...$("size").options].some(({ value }) => value === before)) $("size").value = before;
    this.#showOther();
  }

  read() {
    if ($("size").value === AS_IT_COMES) return {};
    if ($("size").value === OTHER) return { width: Number($("width").value), height: Number($("height").value) };
    const [width, height] = $("size").value.split(" × ").map(Number);
    return { width, height };
  }

  // Shows a past request's again; `source` is the size of the picture it started from, or null.
  show({ width, height }, source) {
    const asItComes = width == null || (width === source?.width && height === source?.height);
    const listed = [...$("size").options].some(({ value }) => value === words({ width, height }));
    $("size").value = asItComes ? AS_IT_COMES : listed ? words({ width, height }) : OTHER;
    if ($("size").value === OTHER) [$("width").value, $("height").value] = [width, height];
    this.#showOther();
  }

  #showOther() {
    const other = $("size").value === OTHER;
    $("other-size").hidden = !other;
    for (const side of ["width", "height"]) Object.assign($(side), { required: other, disabled: !other });
  }
}
