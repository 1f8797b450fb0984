// The JavaScript client of Anthropic.
import Anthropic from "@anthropic-ai/sdk";
import { report } from "./report.mjs";

const [baseURL, ...only] = process.argv.slice(2);
const client = new Anthropic({ baseURL, apiKey: "unused", maxRetries: 0 });
const ask = { model: "tiny", max_tokens: 20, messages: [{ role: "user", content: "hello" }] };

await report({
  stream: () => client.messages.stream(ask).finalText(),
  chat: async () => (await client.messages.create(ask)).content[0].text,
  "not found": () => client.messages.create({ ...ask, model: "nope" }),
}, only);
