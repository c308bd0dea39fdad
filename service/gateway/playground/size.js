// Chooses the size of the finished picture: the default, another that the model draws itself, a multiple of the model's
// own, or any other.

const MULTIPLES = [2, 4, 8];
const MOST_PIXELS = 2 ** 21; // the server's limit; the server itself checks sizes that the user types
const [DEFAULT, OTHER] = ["", "other"];
const ALIKE = 0.01; // shapes count as the same up to this part: rounding to whole pixels makes such differences

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
    this.finished = source ?? { width, height };
    this.usual = words(this.finished);
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

  // The size of the finished picture, also if it is the default, or if what the user types is none yet.
  get asked() {
    const { width, height } = { ...this.finished, ...this.read() };
    return width > 0 && height > 0 ? { width, height } : this.finished;
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

// Rows and columns of the patches of which a model draws a picture of the size asked for: those of its native size that
// is nearest in shape; of several, the smallest with enough pixels, or else the largest. Workers choose in the same way.
export function drawnGrid({ width, height, grid: [rows, columns], sizes: natives = [] }, asked) {
  const pixels = ([across, down]) => across * down;
  const difference = ([across, down]) => Math.abs(Math.log((across * asked.height) / (down * asked.width)));
  const sizes = [[width, height], ...natives];
  const least = Math.min(...sizes.map(difference));
  const shaped = sizes.filter((size) => difference(size) <= least + ALIKE).sort((one, two) => pixels(one) - pixels(two));
  const [across, down] = shaped.find((size) => pixels(size) >= asked.width * asked.height) ?? shaped.at(-1);
  return [(rows * down) / height, (columns * across) / width];
}

// Where a picture lies in a finished one of another size: in its middle, as large as fits. The same shape fills it.
export function placed(picture, frame) {
  const crossed = [picture.width * frame.height, frame.width * picture.height];
  if (Math.abs(crossed[0] - crossed[1]) <= ALIKE * Math.max(...crossed)) return { left: 0, top: 0, ...frame };
  const width = Math.min(frame.width, Math.max(1, Math.round((frame.height * picture.width) / picture.height)));
  const height = Math.min(frame.height, Math.max(1, Math.round((frame.width * picture.height) / picture.width)));
  return { left: Math.floor((frame.width - width) / 2), top: Math.floor((frame.height - height) / 2), width, height };
}
