// The page of the instances: dialogs of orders, live logs, pulls of images, and the filter.
"use strict";
(() => {
  const by = (id) => document.getElementById(id);

  // --- Orders: one dialog for each kind, filled in for the instance of the button ---

  document.addEventListener("click", ({ target }) => {
    const opener = target.closest?.("[data-order]");
    if (opener) openOrder(opener);
    const logs = target.closest?.("[data-logs]");
    if (logs) openLogs(logs);
  });

  function openOrder(opener) {
    const dialog = by(opener.dataset.order);
    const form = dialog.querySelector("form");
    form.reset();
    for (const place of dialog.querySelectorAll(".problem")) place.textContent = "";
    for (const control of form.elements) control.removeAttribute("aria-invalid");
    dialog.querySelector("[data-name]").textContent = opener.dataset.name;
    for (const sender of [form, ...form.querySelectorAll("[data-patch]")]) {
      for (const verb of ["hx-post", "hx-patch"]) if (sender.hasAttribute(verb)) sender.setAttribute(verb, opener.dataset.url);
    }
    form.dataset.url = opener.dataset.url;
    for (const [name, value] of Object.entries(JSON.parse(opener.dataset.values ?? "{}"))) fill(form.elements[name], value);
    if (dialog.id === "order-image") stopPull();
    dialog.showModal();
  }

  function fill(control, value) {
    if (control.options) control.replaceChildren(...value.map((one) => new Option(one, one)));
    else control.value = value ?? "";
  }

  // A load takes as long as it takes, also where the page is left: the dialog closes, the card shows it, and several
  // go on at a time. The second call waits for the same load, to tell what has become of it.
  by("load-form")?.addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = event.target;
    const keep = form.elements.keep_alive.value.trim();
    const body = { model: form.elements.model.value };
    if (keep) body.keep_alive = /^-?\d+(\.\d+)?$/.test(keep) ? Number(keep) : keep;
    form.closest("dialog").close();
    try {
      const url = form.dataset.url;
      let answer = await send(`${url}?wait=false`, body);
      if (answer.status === 202) answer = await send(url, body);
      if (!answer.ok) page.toast("bad", await messageOf(answer));
    } catch {
      page.toast("bad", by("toasts").dataset.failed);
    }
  });

  const send = (url, body, more) => fetch(url, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...more,
  });

  async function messageOf(answer) {
    try { return (await answer.json()).error.message; } catch { return `${by("toasts").dataset.failed} (${answer.status})`; }
  }

  // --- Pulls of images ---

  let pull = null;

  function stopPull() {
    pull?.abort();
    pull = null;
    if (by("pull")) by("pull").hidden = true;
  }

  by("pull-start")?.addEventListener("click", async () => {
    const form = by("order-image").querySelector("form");
    const problem = form.querySelector("[data-problem]");
    if (!form.reportValidity()) return;
    stopPull();
    const mine = pull = new AbortController();
    const place = by("pull");
    const [bar, words] = [place.querySelector("progress"), place.querySelector("p")];
    problem.textContent = "";
    bar.removeAttribute("value");
    words.textContent = "";
    place.hidden = false;
    const layers = new Map();
    try {
      const answer = await send("/api/runtime/compute/pull", { image: form.elements.image.value.trim() }, { signal: mine.signal });
      if (!answer.ok) throw new Error(await messageOf(answer));
      for await (const text of lines(answer)) {
        if (!text.trim()) continue;
        const line = JSON.parse(text);
        if (line.error) throw new Error(line.error.message);
        if (line.layer && line.total_bytes) layers.set(line.layer, [line.current_bytes ?? 0, line.total_bytes]);
        const [have, all] = [...layers.values()].reduce((sum, one) => [sum[0] + one[0], sum[1] + one[1]], [0, 0]);
        if (all) bar.value = have / all;
        words.textContent = line.status === "done" ? place.dataset.done : line.status;
        if (line.status === "done") bar.value = 1;
      }
    } catch (error) {
      if (mine.signal.aborted) return;
      place.hidden = true;
      problem.textContent = error.message;
    } finally {
      if (pull === mine) pull = null;
    }
  });
  by("order-image")?.addEventListener("close", stopPull);

  // The lines of an answer as they come. A line without an end is cut.
  const MOST_LINE = 16384;
  async function* lines(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    try {
      for (;;) {
        const { done, value } = await reader.read();
        if (done) break;
        const parts = (rest + value).split("\n");
        rest = parts.pop();
        yield* parts;
        if (rest.length > MOST_LINE) { yield rest; rest = ""; }
      }
      if (rest) yield rest;
    } finally {
      reader.cancel().catch(() => {});
    }
  }

  // --- Live logs ---

  // The page holds the last lines only; what came while it was paused is bounded, too.
  const MOST_LINES = 2000;
  const MOST_SHOWN = 4096;
  const TAIL = 500;
  const AGAIN_MS = 1500;
  // Colours and other orders to terminals; characters that change the direction of text or show nothing.
  const ORDERS = /\u001b\[[0-?]*[ -/]*[@-~]|\u001b\][^\u0007\u001b]*(?:\u0007|\u001b\\)?|\u001b./g;
  const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

  const dialog = by("logs");
  const list = by("logs-lines");
  const search = by("logs-search");
  let following = null; // { url, name, container, abort }
  let waiting = []; // lines that are not in the page yet
  let drawing = false;
  const isPaused = () => by("logs-pause").getAttribute("aria-pressed") === "true";

  function openLogs(opener) {
    dialog.querySelector("[data-name]").textContent = opener.dataset.name;
    list.replaceChildren();
    waiting = [];
    search.value = "";
    by("logs-follow").checked = true;
    setPaused(false);
    following = { url: opener.dataset.logs, name: opener.dataset.name, container: containerOf(opener.dataset.name) };
    dialog.showModal();
    search.focus();
    read(following, TAIL);
  }

  dialog.addEventListener("close", () => { following?.abort?.abort(); following = null; list.replaceChildren(); waiting = []; });

  const containerOf = (name) => document.querySelector(`[data-instance="${CSS.escape(name)}"]`)?.dataset.container ?? "";

  async function read(mine, tail) {
    mine.abort = new AbortController();
    mine.isOpen = true;
    say("reading");
    try {
      const answer = await fetch(`${mine.url}?follow=true&tail=${tail}`, { signal: mine.abort.signal });
      if (!answer.ok) throw Object.assign(new Error(await messageOf(answer)), { isRefusal: true });
      say(isPaused() ? "paused" : "follows");
      let count = 0;
      for await (const line of lines(answer)) { add(line); count += 1; }
      if (mine !== following) return;
      mine.isOpen = false;
      say(count || list.children.length ? "ended" : "empty");
    } catch (error) {
      if (mine !== following) return;
      mine.isOpen = false;
      if (error.isRefusal) by("logs-state").textContent = error.message;
      else { say("lost"); setTimeout(() => mine === following && !mine.isOpen && again(mine), AGAIN_MS); }
    }
  }

  // The whole tail comes again: the page has to begin anew.
  function again(mine) {
    list.replaceChildren();
    waiting = [];
    read(mine, TAIL);
  }

  // A new container has a new log, which follows the last one's.
  document.addEventListener("htmx:after:swap", () => {
    if (!following || following.isOpen) return;
    const container = containerOf(following.name);
    if (!container || container === following.container) return;
    following.container = container;
    add(dialog.dataset.new, true);
    read(following, TAIL);
  });

  const say = (what) => { by("logs-state").textContent = dialog.dataset[what]; };

  function add(text, isNote = false) {
    waiting.push({ text: cleaned(text), isNote });
    if (waiting.length > MOST_LINES) waiting.shift();
    if (!drawing && !isPaused()) { drawing = true; requestAnimationFrame(draw); }
  }

  function cleaned(text) {
    const plain = text.replace(/\r$/, "").replace(ORDERS, "").replace(HIDDEN, "\u00b7");
    return plain.length > MOST_SHOWN ? `${plain.slice(0, MOST_SHOWN)}\u2026` : plain;
  }

  function draw() {
    drawing = false;
    if (isPaused()) return;
    const fragment = document.createDocumentFragment();
    for (const { text, isNote } of waiting) {
      const line = document.createElement("div");
      if (isNote) line.className = "note";
      line.textContent = text;
      mark(line);
      fragment.append(line);
    }
    waiting = [];
    list.append(fragment);
    while (list.children.length > MOST_LINES) list.firstChild.remove();
    if (by("logs-follow").checked) list.scrollTop = list.scrollHeight;
    countMatches();
  }

  // Lines without the text that is looked for are hidden; text is only ever set as text.
  function mark(line) {
    const wanted = search.value.toLowerCase();
    const text = line.textContent;
    line.hidden = Boolean(wanted) && !text.toLowerCase().includes(wanted);
    if (!wanted || line.hidden) { if (line.children.length) line.textContent = text; return; }
    const parts = [];
    const lower = text.toLowerCase();
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0 && parts.length < 100; at = lower.indexOf(wanted, from)) {
      const found = document.createElement("mark");
      found.textContent = text.slice(at, at + wanted.length);
      parts.push(text.slice(from, at), found);
      from = at + wanted.length;
    }
    line.replaceChildren(...parts, text.slice(from));
  }

  function countMatches() {
    if (!search.value) return;
    const count = list.querySelectorAll("div:not([hidden])").length;
    by("logs-state").textContent = dialog.dataset.matches.replace("{count}", count);
  }

  search.addEventListener("input", () => {
    for (const line of list.children) mark(line);
    if (search.value) countMatches();
    else say(isPaused() ? "paused" : following?.isOpen ? "follows" : "ended");
    if (by("logs-follow").checked) list.scrollTop = list.scrollHeight;
  });

  function setPaused(is) {
    by("logs-pause").setAttribute("aria-pressed", String(is));
    if (!is) draw();
  }
  by("logs-pause").addEventListener("click", () => {
    setPaused(!isPaused());
    say(isPaused() ? "paused" : following?.isOpen ? "follows" : "ended");
  });
  by("logs-follow").addEventListener("change", ({ target }) => { if (target.checked) list.scrollTop = list.scrollHeight; });
  // Whoever scrolls up wants to read; at the end the log follows again.
  list.addEventListener("scroll", () => {
    by("logs-follow").checked = list.scrollTop + list.clientHeight >= list.scrollHeight - 24;
  });
  by("logs-copy").addEventListener("click", async () => {
    const text = [...list.querySelectorAll("div:not([hidden])")].map((line) => line.textContent).join("\n");
    try {
      await navigator.clipboard.writeText(text);
      by("logs-state").textContent = dialog.dataset.copied;
    } catch {
      getSelection().selectAllChildren(list);
    }
  });

  // --- Filter ---

  function filter() {
    const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const card of document.querySelectorAll("[data-words]")) {
      const text = card.dataset.words.toLowerCase();
      const fits = words.every((word) => text.includes(word));
      card.classList.toggle("hidden", !fits);
      shown += fits;
    }
    by("filtered-out")?.classList.toggle("hidden", shown > 0 || !words.length);
  }
  by("filter").addEventListener("input", filter);
  document.addEventListener("htmx:after:swap", filter);
})();
