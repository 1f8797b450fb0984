// What every page does: sends forms as JSON, shows errors at their field, counts times, watches the live channel.
"use strict";
(() => {
  const root = document.documentElement;
  const API = "/api/";

  // --- Requests to the control API -----------------------------------------------------------------------------

  // A control's value as JSON has it. `data-json` names the type: number (times `data-factor`), list or numbers (lines
  // or commas), json, duration (`90s`, `30m`: seconds), from-now (seconds: the moment then). An empty value is null,
  // that of a list is empty. `data-empty`: it is left out (omit), or null (null).
  function valueOf(control) {
    if (control.type === "checkbox") return control.checked;
    const text = control.value.trim();
    const { json, empty } = control.dataset;
    if (text === "" && (empty || !LISTS[json])) return empty === "omit" ? undefined : null;
    if (LISTS[json]) return text.split(/[\n,]+/).map((one) => one.trim()).filter(Boolean).map(LISTS[json]);
    if (json === "number") return numberOf(text, Number(control.dataset.factor ?? 1));
    if (json === "duration") return secondsOf(text) ?? text;
    if (json === "from-now") return new Date((Date.now() / 1000 + ahead + Number(text)) * 1000).toISOString();
    if (json === "json") return jsonValue(text);
    return json === "raw" ? control.value : text;
  }

  const UNITS = { "": 1, s: 1, m: 60, min: 60, h: 3600, d: 86400 };
  function secondsOf(text) {
    const parts = /^(\d+(?:\.\d+)?)\s*([a-z]*)$/.exec(text.toLowerCase());
    return parts && parts[2] in UNITS ? Number(parts[1]) * UNITS[parts[2]] : null;
  }

  // What is no number or no JSON is sent as text: the API says what is wrong with it.
  const numberOf = (text, factor = 1) => (Number.isNaN(Number(text)) ? text : Number(text) * factor);
  const jsonValue = (text) => parsed(text) ?? (text === "null" ? null : text);
  const LISTS = { list: (one) => one, numbers: (one) => numberOf(one) };

  // The JSON object of a form. A name with dots is a path into it, below the list of keys in `data-under`; only
  // changed controls count with `data-changed`. Boxes of one name with `data-json="list"` are the list of those that
  // are checked, left out where none is.
  function jsonOf(form) {
    const body = {};
    const inner = JSON.parse(form.dataset.under ?? "[]").reduce((place, key) => (place[key] = {}), body);
    for (const control of form.elements) {
      if (!control.name || control.disabled || control.type === "submit") continue;
      if (control.type === "radio" && !control.checked) continue;
      if (form.hasAttribute("data-changed") && !isChanged(control)) continue;
      const isEntry = control.type === "checkbox" && control.dataset.json === "list";
      if (isEntry && !control.checked) continue;
      const value = isEntry ? control.value : valueOf(control);
      if (value === undefined) continue;
      const path = control.name.split(".");
      const last = path.pop();
      let place = inner;
      for (const part of path) place = place[part] ??= {};
      if (isEntry) (place[last] ??= []).push(value);
      else place[last] = value;
    }
    return body;
  }

  function isChanged(control) {
    if (control.type === "checkbox" || control.type === "radio") return control.checked !== control.defaultChecked;
    if (control.options) return [...control.options].some((one) => one.selected !== one.defaultSelected);
    return control.value !== control.defaultValue;
  }

  document.addEventListener("htmx:before:request", ({ detail: { ctx } }) => {
    const { request } = ctx;
    if (!request.action.startsWith(API) || request.method === "GET") return;
    // A DELETE has the body of `data-body` alone; a button in a form may have its own.
    const said = ctx.sourceElement.dataset.body;
    const form = request.method === "DELETE" ? null : ctx.sourceElement.closest("form[data-api]");
    const body = form && said === undefined ? jsonOf(form) : JSON.parse(said ?? "null");
    request.body = body === null ? null : JSON.stringify(body);
    if (body !== null) request.headers["Content-Type"] = "application/json";
    if (form) clearProblems(form);
  });

  // The answers of the control API are JSON: they are never swapped into the page.
  document.addEventListener("htmx:after:request", (event) => {
    const { ctx } = event.detail;
    if (!ctx.request.action.startsWith(API)) return;
    event.preventDefault();
    const answer = parsed(ctx.text);
    const source = ctx.sourceElement;
    if (ctx.response.status >= 400) {
      showProblem(source, answer?.error, ctx.response.status);
      return;
    }
    source.dispatchEvent(new CustomEvent("api:done", { bubbles: true, detail: { answer } }));
    if (source.dataset.done) toast("ok", source.dataset.done);
    if (source.closest("[data-refresh]")) refresh();
    source.closest("dialog")?.close();
  });
  document.addEventListener("htmx:error", ({ detail: { ctx } }) => {
    if (ctx?.request && !ctx.sourceElement?.matches("[data-live-channel]")) toast("bad", toasts().dataset.failed);
  });

  function parsed(text) {
    try { return JSON.parse(text); } catch { return null; }
  }

  // An error stands at its field where the form has one of that name, and in a message otherwise.
  function showProblem(source, error, status) {
    const message = typeof error === "string" ? error : error?.message ?? `${toasts().dataset.failed} (${status})`;
    const form = source.closest("form[data-api]");
    const field = error?.field ?? /^([\w.-]+): /.exec(message)?.[1];
    const told = error?.details?.fields ?? (field ? [{ field, message }] : []);
    const problems = told.map((one) => ({ ...one, control: form && controlOf(form, one.field) }));
    const first = form && [...form.elements].find((one) => problems.some(({ control }) => control === one));
    for (const { control, message: words } of problems.filter((one) => one.control)) {
      problemOf(control).textContent = words;
      control.setAttribute("aria-invalid", "true");
    }
    first?.focus();
    if (first && problems.every((one) => one.control)) return;
    const rest = first ? problems.filter((one) => !one.control).map((one) => `${one.field}: ${one.message}`).join("; ") : message;
    const general = form?.querySelector("[data-problem]");
    if (general) general.textContent = rest;
    else toast("bad", rest);
  }

  // The control of a field such as `body.roles.output.queue.length` or `body.instances.0`: that with the longest name.
  function controlOf(form, field) {
    const path = `.${field.replace(/(\.\d+)+$/, "")}`;
    const named = [...form.elements].filter((one) => one.name && path.endsWith(`.${one.name}`) && problemOf(one));
    return named.sort((one, other) => other.name.length - one.name.length)[0];
  }

  const problemOf = (control) => document.getElementById(control.getAttribute("aria-describedby")?.split(" ").pop());

  function clearProblems(form) {
    for (const control of form.elements) control.removeAttribute("aria-invalid");
    for (const place of form.querySelectorAll(".problem, [data-problem]")) place.textContent = "";
  }

  // Fetches the page again and morphs its region: controls keep their focus, details stay open.
  function refresh() {
    return htmx.ajax("GET", location.pathname + location.search, { target: "#region", select: "#region", swap: "outerMorph" });
  }

  // --- Messages ------------------------------------------------------------------------------------------------

  const toasts = () => document.getElementById("toasts");
  const MOST_TOASTS = 4;

  // A button that takes a message away.
  function closer(message, label) {
    const close = document.createElement("button");
    close.type = "button";
    close.className = "button button-quiet";
    close.textContent = label;
    close.addEventListener("click", () => message.remove());
    return close;
  }

  function toast(kind, text) {
    const message = document.createElement("div");
    message.className = `notice notice-${kind}`;
    const words = document.createElement("span");
    words.textContent = text;
    message.append(words, closer(message, toasts().dataset.dismiss));
    toasts().append(message);
    while (toasts().children.length > MOST_TOASTS) toasts().firstChild.remove();
    if (kind === "ok") setTimeout(() => message.remove(), 5000);
  }

  document.addEventListener("htmx:confirm", (event) => {
    const { ctx, issueRequest, dropRequest } = event.detail;
    event.preventDefault();
    const dialog = document.getElementById("confirm");
    document.getElementById("confirm-text").textContent = ctx.confirm;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => (dialog.returnValue === "yes" ? issueRequest() : dropRequest()), { once: true });
    dialog.showModal();
  });

  // `data-dialog="id"` opens a dialog, `data-close` closes the one around it.
  document.addEventListener("click", ({ target }) => {
    const opener = target.closest?.("[data-dialog]");
    if (opener) document.getElementById(opener.dataset.dialog)?.showModal();
    if (target.closest?.("[data-close]")) target.closest("dialog")?.close();
    if (target.closest?.("[data-refresh-now]")) refresh();
    if (target.closest?.("[data-theme-switch]")) switchTheme();
  });

  // --- Times ---------------------------------------------------------------------------------------------------

  const pad = (number) => String(number).padStart(2, "0");

  // As `words.duration` of the server has it.
  function duration(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
    if (whole < 86400) return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
    return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
  }

  function tell(time, now) {
    const text = time.dataset.until ? duration(Number(time.dataset.until) - now) : duration(now - Number(time.dataset.since));
    if (time.textContent !== text) time.textContent = text;
  }

  // The clocks of the server and of this machine may differ.
  const ahead = Number(root.dataset.now) - Date.now() / 1000;

  function tellAll() {
    const now = Date.now() / 1000 + ahead;
    for (const time of document.querySelectorAll("time[data-until], time[data-since]")) tell(time, now);
    for (const time of document.querySelectorAll("time[data-at]:empty")) {
      time.textContent = new Date(Number(time.dataset.at) * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "medium", hourCycle: "h23" });
    }
  }
  setInterval(() => { if (!document.hidden) tellAll(); }, 1000);
  document.addEventListener("htmx:after:swap", tellAll);
  document.addEventListener("visibilitychange", tellAll);
  tellAll();

  // --- The live channel ----------------------------------------------------------------------------------------

  document.addEventListener("htmx:sse:after:connection", () => { root.dataset.live = "on"; });
  document.addEventListener("htmx:sse:error", ({ detail: { status } }) => {
    root.dataset.live = "lost";
    if (status === 401) signedOut();
  });
  document.addEventListener("htmx:sse:before:connection", (event) => {
    const { detail } = event;
    if (document.getElementById("signed-out").open) event.preventDefault();
    if (detail.connection.attempt > 0 && !document.hidden) root.dataset.live = "lost";
  });
  document.addEventListener("refresh", refresh);

  // --- The end of the session ------------------------------------------------------------------------------------

  document.addEventListener("over", signedOut);
  // A page in the place of the page, as an error is one, is never swapped in.
  document.addEventListener("htmx:before:response", (event) => {
    const { request, response } = event.detail.ctx;
    if (response.status === 401) signedOut();
    if (response.status === 401 || (response.status >= 400 && !request.action.startsWith(API))) event.preventDefault();
  });

  function signedOut() {
    const dialog = document.getElementById("signed-out");
    dialog.querySelector("a").href = `/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`;
    root.dataset.live = "lost";
    if (!dialog.open) dialog.showModal();
  }

  // --- Navigation ----------------------------------------------------------------------------------------------

  // A narrow window shows the sections in one line: the present one is brought into it, the page does not scroll.
  const section = document.querySelector(".nav [aria-current]");
  if (section) section.parentElement.scrollLeft = section.offsetLeft - (section.parentElement.clientWidth - section.offsetWidth) / 2;

  // --- Theme ---------------------------------------------------------------------------------------------------

  function switchTheme() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    document.dispatchEvent(new Event("theme"));
  }

  window.page = { refresh, toast, closer, duration, isChanged, signedOut };
})();
