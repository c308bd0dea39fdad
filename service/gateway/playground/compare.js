// Two samplers on one seed: what the second did differently, in work and in pixels.

// How close two pictures of one size are, in decibels; infinite if they are the same.
export async function psnr(left, right) {
  const [a, b] = await Promise.all([left, right].map(pixels));
  let squares = 0;
  for (let at = 0; at < a.length; at += 1) if (at % 4 !== 3) squares += (a[at] - b[at]) ** 2; // all but alpha
  return 10 * Math.log10(255 ** 2 / (squares / ((a.length * 3) / 4)));
}

async function pixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

// One sentence over two completed runs; empty while either is not.
export async function verdict([first, second], [firstTitle, secondTitle]) {
  if (!second || first.state !== "completed" || second.state !== "completed") return "";
  const closeness = await psnr(first.pictures[0].final, second.pictures[0].final);
  const ratio = second.report.patch_evaluations / first.report.patch_evaluations;
  const share = `${Math.round(100 * Math.abs(1 - ratio))} % ${ratio < 1 ? "less" : "more"}`;
  const work = ratio === 1 ? "as much work as" : `${share} work than`;
  const likeness = closeness === Infinity ? "are the same" : `agree to ${closeness.toFixed(1)} dB PSNR`;
  return `${secondTitle} did ${work} ${firstTitle}; the pictures ${likeness}.`;
}
