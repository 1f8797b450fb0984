// A request to the daemon as code: curl, Python and JavaScript. All texts in it are hostile.
"use strict";
(() => {
  // What is invisible, or turns the direction of writing, is escaped: what is copied is what is seen.
  const HIDDEN = /[\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
  const escaped = (text) => text.replace(HIDDEN, (one) => `\\u${one.charCodeAt(0).toString(16).padStart(4, "0")}`);
  // A string of JSON is one of JavaScript and of Python too.
  const json = (value, indent) => escaped(JSON.stringify(value, null, indent));
  const VARIABLE = "OLLAMA_MANAGER_KEY";

  function python(value, pad = "") {
    const inner = `${pad}    `;
    if (value === null) return "None";
    if (value === true) return "True";
    if (value === false) return "False";
    if (typeof value !== "object") return json(value);
    const isList = Array.isArray(value);
    const parts = isList ? value.map((one) => python(one, inner))
      : Object.entries(value).map(([name, one]) => `${json(name)}: ${python(one, inner)}`);
    const [open, close] = isList ? "[]" : "{}";
    const line = `${open}${parts.join(", ")}${close}`;
    return line.length < 80 && !line.includes("\n") ? line : `${open}\n${parts.map((one) => inner + one + ",\n").join("")}${pad}${close}`;
  }

  const call = (name, given) => {
    const parts = Object.entries(given).filter(([, value]) => value !== undefined);
    return `${name}(\n${parts.map(([key, value]) => `    ${key}=${python(value, "    ")},\n`).join("")})`;
  };

  function curl({ url, path, body, keyed }) {
    const data = json(body, 2).replaceAll("'", "'\\''");
    return [`curl ${url}${path}`, ...(keyed ? [`-H "Authorization: Bearer $${VARIABLE}"`] : []),
      "-H 'Content-Type: application/json'", `-d '${data}'`].join(" \\\n  ");
  }

  function javascript({ url, path, body, keyed }) {
    const headers = `"Content-Type": "application/json"${keyed ? `, Authorization: \`Bearer \${process.env.${VARIABLE}}\`` : ""}`;
    const reading = path === "/api/embed" ? "console.log(await response.json());" : [
      "let rest = \"\";", "const decoder = new TextDecoder();", "for await (const bytes of response.body) {",
      "  const lines = (rest + decoder.decode(bytes, { stream: true })).split(\"\\n\");", "  rest = lines.pop();",
      "  for (const line of lines.filter(Boolean)) console.log(JSON.parse(line));", "}"].join("\n");
    return `const response = await fetch(${json(url + path)}, {\n  method: "POST",\n  headers: { ${headers} },\n`
      + `  body: JSON.stringify(${json(body, 2).replaceAll("\n", "\n  ")}),\n});\n${reading}`;
  }

  function ollama({ url, path, body, keyed }) {
    const key = keyed ? `, headers={"Authorization": f"Bearer {os.environ['${VARIABLE}']}"}` : "";
    const head = `${keyed ? "import os\n\n" : ""}from ollama import Client\n\nclient = Client(${json(url)}${key})\n`;
    const name = path.slice("/api/".length);
    if (name === "embed") return `${head}answer = ${call("client.embed", body)}\nprint(answer.embeddings)`;
    const piece = name === "chat" ? "part.message.content" : "part.response";
    return `${head}for part in ${call(`client.${name}`, { ...body, stream: true })}:\n    print(${piece} or "", end="", flush=True)`;
  }

  // As OpenAI has it: pictures are parts of the content, calls have ids, and their arguments are text.
  function openaiMessages(messages) {
    let calls = [];
    return messages.map(({ role, content, images, tool_calls: made, tool_name: tool }) => {
      if (made) {
        calls = made.map((one, place) => ({ id: one.id ?? `call_${place}`, name: one.function.name }));
        return { role, content, tool_calls: made.map((one, place) => ({ id: calls[place].id, type: "function",
          function: { name: one.function.name, arguments: JSON.stringify(one.function.arguments) } })) };
      }
      if (tool) {
        const place = calls.findIndex((one) => one.name === tool);
        const id = place < 0 ? "call_0" : calls.splice(place, 1)[0].id;
        return { role, content, tool_call_id: id };
      }
      if (!images) return { role, content };
      const pictures = images.map((data) => ({ type: "image_url", image_url: { url: `data:image/png;base64,${data}` } }));
      return { role, content: [{ type: "text", text: content }, ...pictures] };
    });
  }

  const THOUGHTS = { false: "none", true: "medium" };

  function openai({ url, path, body, keyed }) {
    const key = keyed ? `os.environ["${VARIABLE}"]` : "\"none\"";
    const head = `${keyed ? "import os\n\n" : ""}from openai import OpenAI\n\nclient = OpenAI(base_url=${json(`${url}/v1`)}, api_key=${key})\n`;
    const { model, options = {}, format, think } = body;
    if (path === "/api/embed") return `${head}answer = ${call("client.embeddings.create", { model, input: body.input })}\nprint([one.embedding for one in answer.data])`;
    const common = { model, temperature: options.temperature, top_p: options.top_p, seed: options.seed,
      max_tokens: options.num_predict > 0 ? options.num_predict : undefined, stream: true };
    const system = body.system ? [{ role: "system", content: body.system }] : [];
    const prompt = { role: "user", content: body.prompt, images: body.images };
    const given = { ...common, messages: openaiMessages(body.messages ?? [...system, prompt]), tools: body.tools,
      reasoning_effort: think === undefined ? undefined : THOUGHTS[think] ?? think,
      response_format: format === undefined ? undefined : format === "json" ? { type: "json_object" }
        : { type: "json_schema", json_schema: { name: "answer", schema: format } } };
    return `${head}for part in ${call("client.chat.completions.create", given)}:\n    if part.choices:\n        print(part.choices[0].delta.content or "", end="", flush=True)`;
  }

  window.tryCode = { curl, ollama, openai, javascript };
})();
