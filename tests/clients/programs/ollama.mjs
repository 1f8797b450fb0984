// The JavaScript client of Ollama.
import { Ollama } from "ollama";
import { report } from "./report.mjs";

const [host, ...only] = process.argv.slice(2);
const client = new Ollama({ host });
const messages = [{ role: "user", content: "hello" }];

async function streamed(model) {
  let text = "";
  for await (const part of await client.chat({ model, messages, stream: true })) text += part.message.content;
  return text;
}

await report({
  stream: () => streamed("tiny"),
  chat: async () => (await client.chat({ model: "tiny", messages })).message.content,
  models: async () => (await client.list()).models.map((model) => model.name).sort(),
  show: async () => (await client.show({ model: "tiny" })).details.family,
  embed: async () => (await client.embed({ model: "minilm", input: ["a", "b"] })).embeddings.map((one) => one.length),
  pull: async () => (await client.pull({ model: "big" })).status,
  copy: async () => (await client.copy({ source: "big", destination: "copied" })).status,
  delete: async () => [await client.delete({ model: "big" }), await client.delete({ model: "copied" })],
  "not found": () => streamed("nope"),
}, only);
