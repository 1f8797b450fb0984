// The JavaScript client of OpenAI since version 4.
import OpenAI from "openai";
import { report } from "./report.mjs";

const [url, ...only] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const ask = { model: "tiny", messages: [{ role: "user", content: "hello" }] };

async function streamed(body) {
  let text = "";
  for await (const part of await client.chat.completions.create({ ...body, stream: true })) {
    text += part.choices[0]?.delta?.content ?? "";
  }
  return text;
}

await report({
  stream: () => streamed(ask),
  chat: async () => (await client.chat.completions.create(ask)).choices[0].message.content,
  models: async () => (await client.models.list()).data.map((model) => model.id).sort(),
  model: async () => (await client.models.retrieve("tiny")).id,
  raw: async () => (await client.chat.completions.create(ask).asResponse()).headers.get("content-type"),
  embeddings: async () =>
    (await client.embeddings.create({ model: "minilm", input: ["a", "b"] })).data.map((one) => one.embedding.length),
  responses: async () => (await client.responses.create({ model: "tiny", input: "x" })).output_text,
  transcription: async () =>
    (await client.audio.transcriptions.create({ model: "tiny", file: await OpenAI.toFile(Buffer.from("RIFF1234"), "a.wav") })).text,
  "not found": () => client.chat.completions.create({ ...ask, model: "nope" }),
  "stream not found": () => streamed({ ...ask, model: "nope" }),
}, only);
