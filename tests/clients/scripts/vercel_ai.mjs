// Vercel's `ai`: node vercel_ai.mjs HTTP_URL GRPC_ADDRESS, in the folder of its packages.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateImage } from "ai";
import { assert, check, isPng, packages, png, url } from "./report.mjs";

const how = { baseURL: `${url}/v1`, apiKey: "unused" };
const providers = {
  "@ai-sdk/openai": createOpenAI(how).image("emoji-text"),
  "@ai-sdk/openai-compatible": createOpenAICompatible({ name: "patchforge", ...how }).imageModel("emoji-text"),
};
packages("ai", ...Object.keys(providers));

for (const [name, model] of Object.entries(providers)) {
  await check(`generateImage by ${name}`, async () => {
    const { images } = await generateImage({ model, prompt: "red apple", n: 2, size: "256x256", maxRetries: 0 });
    assert(images.length === 2 && images.every((image) => isPng(image.uint8Array)));
  });

  await check(`generateImage from a picture by ${name}`, async () => {
    const prompt = { text: "green apple", images: [png(64, 64)], mask: png(64, 64, true) };
    const { images } = await generateImage({ model, prompt, maxRetries: 0 });
    assert(isPng(images[0].uint8Array));
  });
}
