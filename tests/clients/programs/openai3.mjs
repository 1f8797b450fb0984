// The JavaScript client of OpenAI before version 4. Its streams are lines that the caller reads.
import { Configuration, OpenAIApi } from "openai";
import { report } from "./report.mjs";

const [url, ...only] = process.argv.slice(2);
const client = new OpenAIApi(new Configuration({ basePath: `${url}/v1`, apiKey: "unused" }));
const ask = { model: "tiny", messages: [{ role: "user", content: "hello" }] };

async function streamed() {
  const answer = await client.createChatCompletion({ ...ask, stream: true }, { responseType: "stream" });
  let text = "", rest = "";
  for await (const piece of answer.data) {
    const lines = (rest + piece.toString()).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) text += JSON.parse(line.slice(6)).choices[0].delta.content;
    }
  }
  return text;
}

await report({
  stream: streamed,
  chat: async () => (await client.createChatCompletion(ask)).data.choices[0].message.content,
  models: async () => (await client.listModels()).data.data.map((model) => model.id).sort(),
  embeddings: async () => (await client.createEmbedding({ model: "minilm", input: ["a", "b"] })).data.data.length,
  "not found": () => client.createChatCompletion({ ...ask, model: "nope" }),
}, only, (error) => error.response?.data);
