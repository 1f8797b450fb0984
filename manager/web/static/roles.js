// Roles: tells what a change has changed in effect, and keeps what is being typed while the page is brought up to date.
"use strict";
(() => {
  const MOST_LINES = 40;
  const place = () => document.getElementById("changes");
  const isRegion = ({ detail: { ctx } }) => (ctx.target?.id ?? String(ctx.target).slice(1)) === "region";

  // --- What changes in effect ------------------------------------------------------------------------------------

  function inForce() {
    const found = new Map();
    for (const role of document.querySelectorAll("[data-role]")) found.set(`role ${role.dataset.role}`, { of: role.dataset.role });
    for (const { dataset } of document.querySelectorAll("[data-setting]")) {
      const { of, label, words, source } = dataset;
      found.set(dataset.setting, { of, label, words, source });
    }
    return found;
  }

  let known = inForce();
  let mine = null; // this window's own change: { lines, isDone }

  const value = (one) => `${one.words} (${one.source})`;

  // The differences; of a role that has come or gone, that alone.
  function linesSince(before, after) {
    const is = (found, of) => found.has(`role ${of}`);
    const lines = [];
    for (const [key, one] of after) {
      const old = before.get(key);
      if (key.startsWith("role ")) {
        if (!old) lines.push({ of: one.of, text: place().dataset.added });
      } else if (old && (old.words !== one.words || old.source !== one.source)) {
        lines.push({ of: one.of, label: one.label, old: value(old), now: value(one) });
      }
    }
    for (const [key, one] of before) {
      if (key.startsWith("role ") && !is(after, one.of)) lines.push({ of: one.of, text: place().dataset.removed });
    }
    return lines.slice(0, MOST_LINES);
  }

  function tell(title, lines) {
    const box = document.createElement("div");
    box.className = "notice notice-ok";
    const head = document.createElement("div");
    head.className = "row-wide";
    const words = document.createElement("strong");
    words.textContent = title;
    head.append(words, window.page.closer(box, place().dataset.close));
    const list = document.createElement("ul");
    list.className = "change-list small";
    for (const line of lines) {
      const item = document.createElement("li");
      const of = document.createElement("b");
      of.textContent = line.of;
      item.append(of, line.label ? ` ${line.label}: ` : ` ${line.text}`);
      if (line.label) {
        const old = document.createElement("s");
        old.textContent = line.old;
        const now = document.createElement("strong");
        now.textContent = line.now;
        item.append(old, " \u2192 ", now);
      }
      list.append(item);
    }
    box.append(head, list);
    place().replaceChildren(box);
  }

  document.addEventListener("htmx:before:request", ({ detail: { ctx } }) => {
    if (!ctx.request.action.startsWith("/api/settings/")) return;
    mine = { lines: [], isDone: false };
    // What an earlier change has done would stand over the field that a refusal names.
    place().replaceChildren();
  });
  document.addEventListener("htmx:after:request", ({ detail: { ctx } }) => {
    if (ctx.request.action.startsWith("/api/settings/") && ctx.response.status >= 400) mine = null;
  });
  document.addEventListener("api:done", ({ target }) => {
    if (mine) mine.isDone = true;
    const form = target.closest("form[data-api]");
    if (form && target === form) saved.add(form);
    if (form?.hasAttribute("data-new-role")) form.reset();
  });

  function tellChanges() {
    const now = inForce();
    const lines = linesSince(known, now);
    known = now;
    if (mine) mine.lines.push(...lines);
    const told = mine ? mine.lines : lines;
    if (told.length) tell(mine ? place().dataset.mine : place().dataset.theirs, told);
    else if (mine?.isDone) tell(place().dataset.nothing, []);
    if (mine?.isDone) mine = null;
  }

  // --- What is being typed ---------------------------------------------------------------------------------------

  const saved = new Set(); // forms whose values have arrived
  let typed = new Map();
  let focused = null; // the setting that has the focus

  const controls = () => [...document.querySelectorAll("#region form[data-api] :is(input, select, textarea)")];

  document.addEventListener("htmx:before:swap", (event) => {
    if (!isRegion(event)) return;
    focused = document.activeElement?.closest("#region [data-setting]")?.dataset.setting ?? null;
    const open = controls().filter((one) => !saved.has(one.form) && window.page.isChanged(one));
    typed = new Map(open.map((one) => [one.id, one.type === "checkbox" ? one.checked : one.value]));
  });

  // Beside what is being typed stands what is in force.
  const mark = (control) => control.closest("[data-setting]")?.classList.toggle("is-typed", window.page.isChanged(control));
  for (const type of ["input", "change"]) {
    document.addEventListener(type, ({ target }) => { if (target.name && target.closest("#region")) mark(target); });
  }

  // Untouched controls show what is in force now; touched ones keep what was typed.
  function restore() {
    for (const control of controls()) {
      if (control.type === "checkbox") control.checked = typed.get(control.id) ?? control.defaultChecked;
      else if (typed.has(control.id)) control.value = typed.get(control.id);
      else if (control.options) for (const one of control.options) one.selected = one.defaultSelected;
      else control.value = control.defaultValue;
      mark(control);
    }
    typed = new Map();
    saved.clear();
    // A button that has gone, such as a reset, leaves the focus to the control beside it.
    if (focused && document.activeElement === document.body) {
      const setting = [...document.querySelectorAll("[data-setting]")].find((one) => one.dataset.setting === focused);
      setting?.querySelector("input, select, textarea, button")?.focus();
    }
  }

  document.addEventListener("htmx:after:swap", (event) => {
    if (!isRegion(event)) return;
    restore();
    tellChanges();
  });

  // --- A new role, and links to one ------------------------------------------------------------------------------

  document.addEventListener("input", ({ target }) => {
    if (target.matches("[data-name]")) target.form.dataset.under = JSON.stringify(["roles", target.value.trim()]);
  });

  function openNamed() {
    const named = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (named?.matches("[data-role]")) named.querySelector("details").open = true;
  }
  window.addEventListener("hashchange", openNamed);
  openNamed();
})();
