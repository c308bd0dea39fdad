// Reads the two EXIF fields in which a JPEG or WebP file says how it was made.

const [EXIF_POINTER, USER_COMMENT, MAKER_NOTE] = [0x8769, 0x9286, 0x927c];
const HEADER = "Exif\0\0";
const MOST_ENTRIES = 1000;

const latin = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

// The bytes of EXIF in a file, or null: the APP1 segment of a JPEG, the EXIF chunk of a WebP.
export function findExif(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  if (view.byteLength > 4 && view.getUint16(0) === 0xffd8) return inJpeg(file, view);
  if (latin(file.subarray(0, 4)) === "RIFF" && latin(file.subarray(8, 12)) === "WEBP") return inWebp(file, view);
  return null;
}

function inJpeg(file, view) {
  for (let at = 2; at + 4 <= view.byteLength && view.getUint8(at) === 0xff;) {
    const [kind, size] = [view.getUint8(at + 1), view.getUint16(at + 2)];
    const body = file.subarray(at + 4, at + 2 + size);
    if (kind === 0xe1 && latin(body.subarray(0, 6)) === HEADER) return body.subarray(6);
    if (kind === 0xda) return null; // the pixels begin
    at += 2 + size;
  }
  return null;
}

function inWebp(file, view) {
  for (let at = 12; at + 8 <= view.byteLength;) {
    const size = view.getUint32(at + 4, true);
    const body = file.subarray(at + 8, at + 8 + size);
    if (latin(file.subarray(at, at + 4)) === "EXIF") return latin(body.subarray(0, 6)) === HEADER ? body.subarray(6) : body;
    at += 8 + size + (size % 2);
  }
  return null;
}

// {comment, note} as text; what is missing or damaged is null.
export function readExif(bytes) {
  try {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const little = view.getUint16(0) === 0x4949;
    const pointer = directory(view, view.getUint32(4, little), little).get(EXIF_POINTER);
    if (pointer === undefined) return { comment: null, note: null };
    const fields = directory(view, view.getUint32(pointer.at, little), little);
    const content = (tag) => {
      const field = fields.get(tag);
      if (field === undefined) return null;
      const start = field.count > 4 ? view.getUint32(field.at, little) : field.at;
      return bytes.subarray(start, start + field.count);
    };
    const [comment, note] = [content(USER_COMMENT), content(MAKER_NOTE)];
    return { comment: comment && commentText(comment), note: note && new TextDecoder().decode(note) };
  } catch (error) {
    if (error instanceof RangeError) return { comment: null, note: null }; // points outside of the file
    throw error;
  }
}

// Fields of one byte per item by tag, and pointers: {count, at}, where `at` is the place of the value or of its offset.
function directory(view, start, little) {
  const fields = new Map();
  const entries = Math.min(MOST_ENTRIES, view.getUint16(start, little));
  for (let at = start + 2; at < start + 2 + 12 * entries; at += 12) {
    fields.set(view.getUint16(at, little), { count: view.getUint32(at + 4, little), at: at + 8 });
  }
  return fields;
}

// A comment begins with the name of its encoding. UTF-16 comes in both byte orders, whatever the file's own is.
function commentText(bytes) {
  const body = bytes.subarray(8);
  if (latin(bytes.subarray(0, 7)) !== "UNICODE") return new TextDecoder().decode(body);
  const zeros = [0, 1].map((odd) => body.filter((byte, at) => at % 2 === odd && byte === 0).length);
  return new TextDecoder(zeros[1] > zeros[0] ? "utf-16le" : "utf-16be").decode(body);
}
