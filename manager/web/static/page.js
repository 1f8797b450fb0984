// What every page does: sends forms as JSON, shows errors at their field, counts times, watches the live channel.
"use strict";
(() => {
  const root = document.documentElement;
  const API = "/api/";

  // --- Requests to the control API -----------------------------------------------------------------------------

  // A control's value as JSON has it. `data-json` names the type: number, list (lines or commas), json; an empty
  // value is null, or left out with `data-empty="omit"`.
  function valueOf(control) {
    if (control.type === "checkbox") return control.checked;
    const text = control.value.trim();
    if (control.dataset.json === "list") return text ? text.split(/[\n,]+/).map((one) => one.trim()).filter(Boolean) : [];
    if (text === "") return control.dataset.empty === "omit" ? undefined : null;
    if (control.dataset.json === "number") return Number.isNaN(Number(text)) ? text : Number(text);
    if (control.dataset.json === "json") return JSON.parse(text);
    return control.dataset.json === "raw" ? control.value : text;
  }

  // The JSON object of a form. A name with dots is a path into it; only changed controls count with `data-changed`.
  function jsonOf(form) {
    const body = {};
    for (const control of form.elements) {
      if (!control.name || control.disabled || control.type === "submit") continue;
      if (control.type === "radio" && !control.checked) continue;
      if (form.hasAttribute("data-changed") && !isChanged(control)) continue;
      const value = valueOf(control);
      if (value === undefined) continue;
      const path = control.name.split(".");
      const last = path.pop();
      let place = body;
      for (const part of path) place = place[part] ??= {};
      place[last] = value;
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
    if (!request.action.startsWith(API) || request.method === "GET" || request.method === "DELETE") return;
    const form = ctx.sourceElement.closest("form[data-api]");
    const body = form ? jsonOf(form) : JSON.parse(ctx.sourceElement.dataset.body ?? "null");
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
    const message = error?.message ?? `${toasts().dataset.failed} (${status})`;
    const form = source.closest("form[data-api]");
    const field = error?.field ?? /^([\w.-]+): /.exec(message)?.[1];
    const control = form && field ? [...form.elements].find((one) => one.name && field.endsWith(one.name)) : null;
    const place = control ? document.getElementById(control.getAttribute("aria-describedby")?.split(" ").pop()) : null;
    const general = form?.querySelector("[data-problem]");
    if (place) {
      place.textContent = message;
      control.setAttribute("aria-invalid", "true");
      control.focus();
    } else if (general) {
      general.textContent = message;
    } else {
      toast("bad", message);
    }
  }

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

  function toast(kind, text) {
    const message = document.createElement("div");
    message.className = `notice notice-${kind}`;
    const words = document.createElement("span");
    words.textContent = text;
    const close = document.createElement("button");
    close.type = "button";
    close.className = "button button-quiet";
    close.textContent = toasts().dataset.dismiss;
    close.addEventListener("click", () => message.remove());
    message.append(words, close);
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
      time.textContent = new Date(Number(time.dataset.at) * 1000).toLocaleString();
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

  // --- Theme ---------------------------------------------------------------------------------------------------

  function switchTheme() {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
    document.dispatchEvent(new Event("theme"));
  }

  window.page = { refresh, toast, duration, signedOut };
})();
