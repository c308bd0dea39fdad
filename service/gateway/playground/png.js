// The chunks of a PNG file: text is read from them, and copied to another PNG.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];
const TEXTS = ["tEXt", "zTXt", "iTXt"];
const MOST_TEXT = 2 ** 20; // bytes of one text, unpacked

const CRC = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

export function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 0xff] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

// [{kind, body, whole}], as far as the file is intact; null if it is no PNG.
function chunks(file) {
  if (SIGNATURE.some((byte, at) => file[at] !== byte)) return null;
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const found = [];
  for (let at = 8; at + 12 <= file.length;) {
    const size = view.getUint32(at);
    const kind = String.fromCharCode(...file.subarray(at + 4, at + 8));
    if (at + 12 + size > file.length) break;
    found.push({ kind, body: file.subarray(at + 8, at + 8 + size), whole: file.subarray(at, at + 12 + size) });
    at += 12 + size;
  }
  return found;
}

// The texts of a PNG by their keywords; null if it is no PNG.
export async function readTexts(file) {
  const found = chunks(file);
  if (found === null) return null;
  const texts = new Map();
  for (const { kind, body } of found.filter((chunk) => TEXTS.includes(chunk.kind))) {
    const [keyword, text] = await textOf(kind, body).catch(() => [null]); // a damaged text is no text
    if (keyword) texts.set(keyword, text);
  }
  return texts;
}

async function textOf(kind, body) {
  const end = body.indexOf(0);
  const keyword = new TextDecoder("latin1").decode(body.subarray(0, end));
  if (kind === "tEXt") return [keyword, new TextDecoder("latin1").decode(body.subarray(end + 1))];
  if (kind === "zTXt") return [keyword, new TextDecoder("latin1").decode(await inflate(body.subarray(end + 2)))];
  const packed = body[end + 1] === 1;
  let at = body.indexOf(0, end + 3) + 1; // skips the language,
  at = body.indexOf(0, at) + 1; // and the translated keyword
  const text = body.subarray(at);
  return [keyword, new TextDecoder().decode(packed ? await inflate(text) : text)];
}

async function inflate(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const parts = [];
  for (let total = 0; total <= MOST_TEXT;) {
    const { value, done } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    total += value.length;
  }
  throw new RangeError("this text is too long");
}

// The PNG `target` with the texts of the PNG `source`. Takes and returns Blobs.
export async function copyTexts(source, target) {
  const [from, to] = await Promise.all([source, target].map(async (blob) => new Uint8Array(await blob.arrayBuffer())));
  const texts = (chunks(from) ?? []).filter(({ kind }) => TEXTS.includes(kind)).map(({ whole }) => whole);
  const [header, ...rest] = chunks(to).map(({ whole }) => whole);
  return new Blob([new Uint8Array(SIGNATURE), header, ...texts, ...rest], { type: "image/png" });
}
