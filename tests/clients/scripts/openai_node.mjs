// OpenAI's client for Node: node openai_node.mjs HTTP_URL GRPC_ADDRESS, in the folder of its packages.
import OpenAI, { BadRequestError, toFile } from "openai";
import { assert, check, isPng, packages, png, url } from "./report.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const decoded = (image) => Buffer.from(image.b64_json, "base64");
packages("openai");

await check("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert(names.includes("emoji-text"), names.join());
});

await check("generate, without a model", async () => {
  const made = await client.images.generate({ prompt: "red apple", n: 2, size: "256x256" });
  assert(made.data.length === 2 && made.data.every((image) => isPng(decoded(image))));
});

await check("pictures by URL", async () => {
  const made = await client.images.generate({ prompt: "red apple", response_format: "url" });
  assert(isPng(await (await fetch(made.data[0].url)).arrayBuffer()));
});

await check("stream with 2 partial images", async () => {
  const kinds = [];
  const wish = { model: "emoji-text", prompt: "red apple", stream: true, partial_images: 2 };
  for await (const event of await client.images.generate(wish)) kinds.push(event.type);
  const partial = "image_generation.partial_image";
  assert(kinds.join() === [partial, partial, "image_generation.completed"].join(), kinds.join());
});

await check("edit with a mask", async () => {
  const made = await client.images.edit({
    model: "emoji-text",
    prompt: "green apple",
    image: await toFile(png(64, 64), "a.png", { type: "image/png" }),
    mask: await toFile(png(64, 64, true), "m.png", { type: "image/png" }),
  });
  assert(isPng(decoded(made.data[0])));
});

await check("edit of a list of one, streamed", async () => {
  const image = [await toFile(png(64, 64), "a.png", { type: "image/png" })];
  const kinds = [];
  const wish = { model: "emoji-text", prompt: "green apple", image, stream: true, partial_images: 1 };
  for await (const event of await client.images.edit(wish)) kinds.push(event.type);
  assert(kinds.join() === "image_edit.partial_image,image_edit.completed", kinds.join());
});

await check("batches: file, state, results", async () => {
  const endpoint = "/v1/images/generations";
  const line = { custom_id: "a", method: "POST", url: endpoint, body: { prompt: "red apple", quality: "low" } };
  const file = await client.files.create({
    file: await toFile(Buffer.from(JSON.stringify(line)), "requests.jsonl"),
    purpose: "batch",
  });
  let batch = await client.batches.create({ input_file_id: file.id, endpoint, completion_window: "24h" });
  while (["in_progress", "finalizing"].includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    batch = await client.batches.retrieve(batch.id);
  }
  assert(batch.status === "completed" && batch.request_counts.completed === 1, JSON.stringify(batch));
  const result = JSON.parse(await (await client.files.content(batch.output_file_id)).text());
  assert(result.custom_id === "a" && isPng(decoded(result.response.body.data[0])));
});

await check("retired parameters refused in words that help", async () => {
  try {
    await client.images.generate({ model: "emoji-text", prompt: "apple", style: "vivid" });
  } catch (error) {
    assert(error instanceof BadRequestError && error.param === "style" && error.message.includes("not supported"));
    return;
  }
  throw new Error("style was taken");
});
