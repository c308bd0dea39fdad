// What every script of a client for Node uses: checks run one by one, and each prints how it went, as JSON.
import { readFileSync } from "node:fs";
import { deflateSync, crc32 } from "node:zlib";

export const [url] = process.argv.slice(2);

export function packages(...names) {
  const versions = Object.fromEntries(
    names.map((name) => [name, JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf8")).version]),
  );
  console.log(JSON.stringify({ versions }));
}

export async function check(what, tried) {
  try {
    await tried();
    console.log(JSON.stringify({ check: what, works: true }));
  } catch (error) {
    console.error(error);
    console.log(JSON.stringify({ check: what, works: false, why: String(error) }));
  }
}

export function assert(condition, why = "not as expected") {
  if (!condition) throw new Error(why);
}

export function isPng(bytes) {
  return Buffer.from(bytes).subarray(0, 4).equals(Buffer.from([0x89, 0x50, 0x4e, 0x47]));
}

// A picture: blue, or with `alpha` black and transparent on its left half.
export function png(width, height, alpha = false) {
  const chunk = (kind, data) => {
    const body = Buffer.concat([Buffer.from(kind), data]);
    const [length, sum] = [Buffer.alloc(4), Buffer.alloc(4)];
    length.writeUInt32BE(data.length);
    sum.writeUInt32BE(crc32(body));
    return Buffer.concat([length, body, sum]);
  };
  const pixel = (x) => (alpha ? [0, 0, 0, x < width / 2 ? 0 : 255] : [0, 0, 255]);
  const row = Buffer.from([0, ...Array.from({ length: width }, (_, x) => pixel(x)).flat()]);
  const header = Buffer.from([0, 0, 0, 0, 0, 0, 0, 0, 8, alpha ? 6 : 2, 0, 0, 0]);
  header.writeUInt32BE(width, 0);
  header.writeUInt32BE(height, 4);
  const pixels = deflateSync(Buffer.concat(Array(height).fill(row)));
  const signature = Buffer.from([0x89, 0x50, 0x4e, 0x47, 13, 10, 26, 10]);
  return Buffer.concat([signature, chunk("IHDR", header), chunk("IDAT", pixels), chunk("IEND", Buffer.alloc(0))]);
}
