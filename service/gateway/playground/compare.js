// Compares two samplers on the same seed, in work and in pixels.

// The PSNR of two pictures of the same size, in decibels; infinite if they are identical.
export async function psnr(left, right) {
  const [a, b] = await Promise.all([left, right].map(pixels));
  let squares = 0;
  for (let at = 0; at < a.length; at += 1) if (at % 4 !== 3) squares += (a[at] - b[at]) ** 2; // skips alpha
  return 10 * Math.log10(255 ** 2 / (squares / ((a.length * 3) / 4)));
}

async function pixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

// One sentence that compares two runs; empty until both have completed.
export async function verdict([first, second], [firstTitle, secondTitle]) {
  if (!second || first.state !== "completed" || second.state !== "completed") return "";
  const closeness = await psnr(first.pictures[0].final, second.pictures[0].final);
  const ratio = second.report.patch_evaluations / first.report.patch_evaluations;
  const share = `${Math.round(100 * Math.abs(1 - ratio))} % ${ratio < 1 ? "less" : "more"}`;
  const work = ratio === 1 ? "the same work as" : `${share} work than`;
  const likeness = closeness === Infinity
    ? "The pictures are identical." : `PSNR between the pictures: ${closeness.toFixed(1)} dB.`;
  return `${secondTitle} did ${work} ${firstTitle}. ${likeness}`;
}
