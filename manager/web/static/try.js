// Conversations with the daemon. What servers say is shown as text: nodes are made, HTML is never parsed.
"use strict";
(() => {
  const { make, Prose } = window.tryText;
  const byId = (name) => document.getElementById(`try-${name}`);
  const root = document.getElementById("try");
  const t = JSON.parse(root.dataset.texts);
  const settings = byId("settings");
  const fields = settings.elements;
  const turns = byId("turns");
  const prompt = byId("prompt");
  const MOST_PICTURES = 8, MOST_PICTURE_MB = 20;
  const DASH = "–";
  let messages = []; // as `/api/chat` takes them
  let pictures = []; // of the next message: { name, data (base64), url }
  let running = null; // the AbortController of the request under way
  let sent = null; // the last request: { path, body }
  let models = [];

  const put = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  const copyOf = (name) => byId(name).content.firstElementChild.cloneNode(true);

  // --- What may be asked ---

  async function readModels() {
    try {
      const response = await fetch("/v1/models");
      if (!response.ok) throw new Refused(await wordsOf(response), response);
      models = (await response.json()).data;
      offer();
    } catch (error) {
      fields.model.options[0].textContent = t.none;
      byId("model-hint").replaceChildren(...wordsOfError(error));
    }
  }

  const isVector = (one) => one.kind === "embed" || (one.capabilities?.includes("embedding") && !one.capabilities.includes("completion"));

  function offer() {
    const asked = new URLSearchParams(location.search);
    const chosen = fields.model.value || asked.get("model");
    const vectors = fields.mode.value === "embed";
    const fitting = models.filter((one) => one.kind !== "transcribe" && (vectors ? isVector(one) || !one.capabilities && !one.kind : !isVector(one)));
    const groups = [[t.roles, (one) => one.kind], [t.models, (one) => !one.kind]].map(([label, belongs]) => {
      const group = document.createElement("optgroup");
      group.label = label;
      group.append(...fitting.filter(belongs).map((one) => {
        const means = root.dataset.auto && /^auto(:|$)/.test(one.id) ? t.open : one.model;
        const option = make("option", one.kind ? `${one.id} (${means})` : one.loaded ? `${one.id} (${t.loaded})` : one.id);
        option.value = one.id;
        return option;
      }));
      return group;
    });
    const filled = groups.filter((group) => group.children.length);
    if (filled.length) fields.model.replaceChildren(...filled);
    else fields.model.replaceChildren(new Option(t.none, ""));
    if (fitting.some((one) => one.id === chosen)) fields.model.value = chosen;
    hint(fitting.length);
  }

  function hint(any) {
    const can = models.find((one) => one.id === fields.model.value)?.capabilities;
    byId("model-hint").textContent = any ? can?.length ? `${t.can} ${can.join(", ")}` : "" : t.none_next;
  }

  function shape() {
    for (const part of document.querySelectorAll("[data-modes]")) part.hidden = !part.dataset.modes.includes(fields.mode.value);
    settings.querySelector("[data-schema]").hidden = fields.format.value !== "schema";
    snippet();
  }

  // --- The request ---

  function parsed(control, isRight = () => true) {
    const place = byId(`${control.name}-problem`);
    let problem = "";
    try {
      const value = JSON.parse(control.value);
      if (isRight(value)) return value;
      problem = t.expected_list;
    } catch (error) {
      problem = put(t.not_json, { problem: error.message });
    } finally {
      place.textContent = problem;
      control.toggleAttribute("aria-invalid", Boolean(problem));
      if (problem) control.setAttribute("aria-invalid", "true");
    }
    throw new WrongSettingError(control);
  }

  class WrongSettingError extends Error {
    constructor(control) { super("a setting is wrong"); this.control = control; }
  }

  function requestFor(said) {
    const mode = fields.mode.value;
    const body = { model: fields.model.value + (fields.instance.value ? `@${fields.instance.value}` : "") };
    const last = said.at(-1) ?? { content: "" };
    const system = fields.system.value.trim();
    if (mode === "embed") {
      body.input = last.content.split("\n").filter((line) => line.trim());
    } else if (mode === "generate") {
      Object.assign(body, { prompt: last.content }, system && { system }, last.images && { images: last.images });
    } else {
      body.messages = [...(system ? [{ role: "system", content: system }] : []), ...said];
      if (fields.offers.checked) body.tools = parsed(fields.tools, Array.isArray);
    }
    const options = {};
    for (const control of settings.querySelectorAll("[data-option]")) {
      if (!control.checkValidity()) throw new WrongSettingError(control);
      if (control.value !== "" && !control.closest("[hidden]")) options[control.name] = Number(control.value);
    }
    if (mode !== "embed") {
      const think = fields.think.value;
      if (think) body.think = think === "true" || think === "false" ? think === "true" : think;
      if (fields.format.value) body.format = fields.format.value === "schema" ? parsed(fields.schema) : "json";
    }
    if (Object.keys(options).length) body.options = options;
    const keep = fields.keep_alive.value.trim();
    if (keep) body.keep_alive = /^-?\d+$/.test(keep) ? Number(keep) : keep;
    return { path: `/api/${mode}`, body };
  }

  // --- One answer ---

  function milliseconds(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return DASH;
    if (value < 1000) return `${Math.round(value)} ms`;
    return value < 10_000 ? `${(value / 1000).toFixed(1)} s` : page.duration(value / 1000);
  }

  class Answer {
    constructor() {
      this.item = copyOf("answer");
      this.times = {};
      this.said = null;
      turns.append(this.item);
      this.prose = new Prose(this.part("text"));
      this.began = performance.now();
      this.waiting = setInterval(() => this.wait(), 250);
      this.wait();
      this.item.scrollIntoView({ block: "nearest" });
    }
    part(name) { return this.item.querySelector(`[data-${name}]`); }
    fact(name, text) { this.item.querySelector(`[data-fact="${name}"]`).textContent = text; }
    wait() { this.part("waits").textContent = `${t.waiting} ${milliseconds(performance.now() - this.began)}`; }
    time(name, value) {
      this.times[name] = value;
      this.fact(name, milliseconds(value));
    }
    heads(headers) {
      const given = (name) => headers.get(name);
      const number = (name) => (given(name) === null ? null : Number(given(name)));
      const instance = given("X-Instance");
      this.fact("instance", instance ?? DASH);
      if (instance) this.part("who").textContent = instance;
      this.fact("model", given("X-Model") ?? DASH);
      this.fact("provider", given("X-Provider") ?? DASH);
      this.fact("cost", given("X-Cost-USD") === null ? DASH : `$${given("X-Cost-USD")}`);
      this.time("queue", number("X-Queue-Ms"));
      if (number("X-Start-Ms") !== null) this.time("start", number("X-Start-Ms"));
      const reason = given("X-Fallback-Reason");
      this.part("fallback").hidden = !reason;
      if (reason) this.part("fallback").textContent = put(t.fallback, { instance: instance ?? DASH, reason });
      const tier = given("X-Tier");
      this.part("choice").hidden = !tier;
      if (tier) this.part("choice").textContent = put(t.choice, { tier, task: given("X-Task-Type") });
      const id = given("X-Request-Id");
      if (!id) return;
      this.part("id").textContent = id;
      if (root.dataset.explains) {
        const link = copyOf("explain");
        link.href = `/ui/requests?id=${encodeURIComponent(id)}`;
        this.part("id").append(" ", link);
      }
    }
    first() {
      if (this.times.first === undefined) this.time("first", performance.now() - this.began);
    }
    think(text) {
      this.thoughts ??= new Prose(this.part("thinking"), false);
      this.part("thoughts").hidden = false;
      this.thoughts.add(text);
    }
    take(line) {
      const { message = {} } = line;
      const text = message.content || line.response;
      const thought = message.thinking || line.thinking;
      if (text || thought || message.tool_calls) this.first();
      if (thought) this.think(thought);
      if (text) this.prose.add(text);
      if (message.tool_calls) this.calls = [...(this.calls ?? []), ...message.tool_calls];
      if (line.embeddings) this.vectors(line.embeddings);
      if (line.done || line.embeddings) this.figures(line);
    }
    figures(line) {
      const ms = (name) => (line[name] === undefined ? null : line[name] / 1e6);
      for (const [name, key] of [["load", "load_duration"], ["read", "prompt_eval_duration"], ["write", "eval_duration"]]) {
        if (line[key] !== undefined) this.time(name, ms(key));
      }
      this.fact("tokens", `${line.prompt_eval_count ?? DASH}, ${line.eval_count ?? DASH}`);
      const seconds = ms("eval_duration") / 1000;
      if (line.eval_count && seconds) this.fact("speed", (line.eval_count / seconds).toFixed(1));
      if (line.done_reason === "length") this.note(t.length);
    }
    vectors(found) {
      const [first] = found;
      const norm = (one) => Math.sqrt(one.reduce((sum, value) => sum + value * value, 0));
      found.forEach((one, place) => {
        const numbers = one.slice(0, 6).map((value) => value.toFixed(4)).join(", ");
        let text = put(t.vector, { count: one.length, numbers });
        const dot = one.reduce((sum, value, at) => sum + value * first[at], 0) / (norm(one) * norm(first));
        if (place) text += `\n${put(t.similarity, { value: dot.toFixed(3) })}`;
        this.part("text").append(make("p", text));
      });
    }
    note(text) { this.part("text").append(make("p", text, "hint")); }
    problem(...nodes) {
      this.part("problem-of-answer").hidden = false;
      this.part("problem-of-answer").replaceChildren(...nodes);
    }
    end() {
      clearInterval(this.waiting);
      this.part("waits").textContent = "";
      this.prose.end();
      this.thoughts?.end();
      this.time("total", performance.now() - this.began);
      this.bar();
      this.said = { role: "assistant", content: this.prose.text };
      if (this.calls) this.said.tool_calls = this.calls;
      if (this.calls && this.thoughts) this.said.thinking = this.thoughts.text;
      return this.said;
    }
    bar() {
      const stages = ["queue", "start", "load", "read", "write"].map((name) => this.times[name] ?? 0);
      const whole = Math.max(this.times.total, stages.reduce((sum, one) => sum + one, 0)) || 1;
      let x = 0;
      this.item.querySelectorAll(".bar rect").forEach((rect, place) => {
        rect.setAttribute("x", x.toFixed(1));
        rect.setAttribute("width", ((stages[place] / whole) * 1000).toFixed(1));
        x += (stages[place] / whole) * 1000;
      });
    }
    askForResults() {
      const form = this.part("calls");
      form.hidden = false;
      const boxes = this.calls.map(({ function: called }, place) => {
        const row = copyOf("call");
        row.querySelector("[data-call]").textContent = `${called.name}(${JSON.stringify(called.arguments)})`;
        const box = row.querySelector("textarea");
        box.id = `try-result-${turns.children.length}-${place}`;
        row.querySelector("label").htmlFor = box.id;
        row.querySelector("label").textContent = put(t.result, called);
        form.append(row);
        return box;
      });
      form.append(copyOf("results"));
      boxes[0].focus({ preventScroll: true });
      boxes[0].scrollIntoView({ block: "center" });
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        if (running) return;
        this.calls.forEach(({ id, function: called }, place) => {
          messages.push({ role: "tool", tool_name: called.name, content: boxes[place].value, ...(id && { tool_call_id: id }) });
          boxes[place].disabled = true;
          show(put(t.result, called), boxes[place].value);
        });
        form.querySelector("button").disabled = true;
        ask();
      });
    }
  }

  class Refused extends Error {
    constructor(message, response) {
      super(message);
      Object.assign(this, { status: response.status, id: response.headers.get("X-Request-Id") });
    }
  }

  // The words of an error, in the shape of Ollama, of OpenAI or of the control API.
  async function wordsOf(response) {
    const text = await response.text();
    try {
      const { error } = JSON.parse(text);
      return error.message ?? error;
    } catch {
      return put(t.failed, response);
    }
  }

  function wordsOfError(error) {
    const words = error instanceof Refused ? error.message : error instanceof TypeError ? t.unreachable : error.message;
    const nodes = [String(words)];
    if (error.id) nodes.push(` (${error.id})`);
    if (error.status === 401) page.signedOut();
    return nodes;
  }

  async function* linesOf(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "", piece = await reader.read(); ; piece = await reader.read()) {
      const lines = (rest + (piece.value ?? "")).split("\n");
      rest = piece.done ? "" : lines.pop();
      for (const line of lines) if (line.trim()) yield JSON.parse(line);
      if (piece.done) return;
    }
  }

  // --- The conversation ---

  function show(who, text, images = []) {
    const item = copyOf("turn");
    item.querySelector("[data-who]").textContent = who;
    item.querySelector("[data-text]").append(make("p", text));
    const row = item.querySelector("[data-pictures]");
    row.hidden = !images.length;
    for (const { url, name } of images) {
      const image = make("img");
      Object.assign(image, { src: url, alt: name });
      row.append(image);
    }
    turns.append(item);
  }

  async function ask() {
    const problem = byId("problem");
    problem.textContent = "";
    try {
      sent = requestFor(messages);
    } catch (error) {
      if (!(error instanceof WrongSettingError)) throw error;
      open(error.control);
      return false;
    }
    running = new AbortController();
    busy();
    const answer = new Answer();
    let isWhole = false;
    try {
      const response = await fetch(sent.path, { method: "POST", headers: { "Content-Type": "application/json" },
        body: JSON.stringify(sent.body), signal: running.signal });
      answer.heads(response.headers);
      if (!response.ok) throw new Refused(await wordsOf(response), response);
      answer.id = response.headers.get("X-Request-Id");
      for await (const line of linesOf(response)) {
        if (line.error) throw Object.assign(new Error(line.error.message ?? line.error), { id: answer.id });
        answer.take(line);
        isWhole ||= Boolean(line.done || line.embeddings);
      }
      if (!isWhole) throw new Error(t.cut);
    } catch (error) {
      if (error.name === "AbortError") answer.note(t.stopped);
      else if (error instanceof SyntaxError) answer.problem(t.unreadable);
      else if (error instanceof TypeError && answer.id) answer.problem(`${t.cut} (${answer.id})`);
      else answer.problem(...wordsOfError(error));
    }
    const said = answer.end();
    running = null;
    if (said.content || said.tool_calls) messages.push(said);
    else answer.said = null;
    answer.item.answer = answer;
    if (answer.calls && isWhole) answer.askForResults();
    busy();
    snippet();
    return true;
  }

  // Shows a control that is wrong, and what is wrong with it.
  function open(control) {
    for (let part = control.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    control.focus();
    control.reportValidity();
  }

  function busy() {
    const isRunning = Boolean(running);
    byId("stop").disabled = !isRunning;
    byId("send").disabled = isRunning;
    byId("again").disabled = isRunning || !turns.children.length;
    byId("clear").disabled = isRunning || !turns.children.length;
    byId("empty").hidden = turns.children.length > 0;
    turns.setAttribute("aria-busy", String(isRunning));
  }

  async function send() {
    const text = prompt.value;
    if (running || (!text.trim() && !pictures.length) || !fields.model.value) {
      (fields.model.value ? prompt : fields.model).focus();
      return;
    }
    const before = messages;
    messages = [...(fields.mode.value === "chat" ? messages : []), draft()];
    const kept = pictures;
    show(byId("turn").content.querySelector("[data-who]").textContent, text, kept);
    prompt.value = "";
    pictures = [];
    preview();
    if (await ask()) return;
    // Nothing was sent: the message goes back to where it was written.
    turns.lastElementChild.remove();
    Object.assign(prompt, { value: text });
    [messages, pictures] = [before, kept];
    preview();
    busy();
  }

  const draft = () => ({ role: "user", content: prompt.value, ...(pictures.length && { images: pictures.map((one) => one.data) }) });

  async function again() {
    const last = turns.lastElementChild;
    if (last.answer) {
      if (last.answer.said) messages.pop();
      last.remove();
    }
    if (!await ask() && last.answer) {
      if (last.answer.said) messages.push(last.answer.said);
      turns.append(last);
    }
  }

  function clear() {
    for (const image of turns.querySelectorAll("img")) URL.revokeObjectURL(image.src);
    turns.replaceChildren();
    [messages, sent] = [[], null];
    busy();
    snippet();
    prompt.focus();
  }

  // --- Pictures ---

  async function attach(files) {
    const problem = byId("problem");
    problem.textContent = "";
    for (const file of files) {
      if (!file.type.startsWith("image/")) problem.textContent = put(t.no_image, file);
      else if (file.size > MOST_PICTURE_MB * 2 ** 20) problem.textContent = put(t.too_large, { name: file.name, size: MOST_PICTURE_MB });
      else if (pictures.length >= MOST_PICTURES) problem.textContent = put(t.too_many, { count: MOST_PICTURES });
      else {
        const picture = { name: file.name, data: "", url: URL.createObjectURL(file) };
        pictures.push(picture);
        picture.data = await base64Of(file);
      }
    }
    preview();
  }

  function base64Of(file) {
    return new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
  }

  function preview() {
    const list = byId("pictures");
    list.hidden = !pictures.length;
    list.replaceChildren(...pictures.map((picture) => {
      const item = copyOf("picture");
      Object.assign(item.querySelector("img"), { src: picture.url, alt: picture.name });
      const remove = item.querySelector("button");
      remove.setAttribute("aria-label", put(t.remove, picture));
      remove.addEventListener("click", () => {
        URL.revokeObjectURL(picture.url);
        pictures = pictures.filter((one) => one !== picture);
        preview();
      });
      return item;
    }));
    snippet();
  }

  // --- The request as code ---

  function snippet() {
    if (!byId("code").open) return;
    const language = document.querySelector("[data-language][aria-pressed='true']").dataset.language;
    let request = sent;
    if (!sent || prompt.value || pictures.length) {
      try {
        request = requestFor([...(fields.mode.value === "chat" ? messages : []), draft()]);
      } catch (error) {
        if (!(error instanceof WrongSettingError)) throw error;
        return;
      }
    }
    const body = structuredClone(request.body);
    for (const one of [body, ...(body.messages ?? [])]) if (one.images) one.images = one.images.map(() => "BASE64");
    byId("snippet").textContent = tryCode[language]({ url: location.origin, path: request.path, body, keyed: Boolean(root.dataset.keyed) });
  }

  function copy() {
    const text = byId("snippet").textContent;
    // Without TLS and beyond loopback there is no clipboard: the text is marked, and copied as by hand.
    const done = navigator.clipboard?.writeText(text) ?? Promise.reject(new Error("no clipboard"));
    done.catch(() => {
      getSelection().selectAllChildren(byId("snippet"));
      if (!document.execCommand("copy")) throw new Error("not copied");
    }).then(() => page.toast("ok", t.copied), () => {});
  }

  // --- Events ---

  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  settings.addEventListener("submit", (event) => event.preventDefault());
  settings.addEventListener("input", shape);
  fields.mode.addEventListener("change", offer);
  fields.model.addEventListener("change", () => hint(true));
  prompt.addEventListener("input", snippet);
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
  });
  prompt.addEventListener("paste", ({ clipboardData: { files } }) => { if (files.length) attach(files); });
  byId("attach").addEventListener("change", ({ target }) => { attach([...target.files]); target.value = ""; });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("again").addEventListener("click", again);
  byId("clear").addEventListener("click", clear);
  byId("copy").addEventListener("click", copy);
  byId("code").addEventListener("toggle", snippet);
  byId("code").addEventListener("click", ({ target }) => {
    if (!target.dataset.language) return;
    for (const one of document.querySelectorAll("[data-language]")) one.setAttribute("aria-pressed", String(one === target));
    snippet();
  });
  const instance = new URLSearchParams(location.search).get("instance");
  if ([...fields.instance.options].some((one) => one.value === instance)) fields.instance.value = instance;
  shape();
  readModels();
})();
