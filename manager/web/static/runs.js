// The form of a new run; a sweep shows first what it would do.
"use strict";
(() => {
  // --- A new run -----------------------------------------------------------------------------------------------

  const path = document.getElementById("run-path");
  const body = document.getElementById("run-body");
  let example = body?.value;
  path?.addEventListener("change", () => {
    if (body.value === example) body.value = path.selectedOptions[0].dataset.example;
    example = path.selectedOptions[0].dataset.example;
  });

  // Before htmx sees it: what is no JSON object is not sent.
  document.addEventListener("submit", (event) => {
    if (!body || event.target !== body.form) return;
    const place = document.getElementById("run-body-problem");
    let problem = "";
    try {
      const value = JSON.parse(body.value);
      if (value === null || typeof value !== "object" || Array.isArray(value)) problem = place.dataset.noObject;
    } catch (error) {
      problem = `${place.dataset.noObject} ${error.message}`;
    }
    place.textContent = problem;
    if (!problem) {
      body.removeAttribute("aria-invalid");
      return;
    }
    body.setAttribute("aria-invalid", "true");
    body.focus();
    event.preventDefault();
    event.stopImmediatePropagation();
  }, true);

  // --- A sweep -------------------------------------------------------------------------------------------------

  document.addEventListener("api:done", ({ target, detail }) => {
    const swept = detail.answer?.instances ?? [];
    const dialog = document.getElementById("reap");
    if (target.matches("[data-reap]")) {
      const list = document.getElementById("reap-list");
      list.replaceChildren(...swept.map((one) => line(list, one)));
      dialog.querySelector("[data-reap-now]").disabled = !swept.some((one) => one.action === "would_stop");
      dialog.showModal();
    }
    if (target.matches("[data-reap-now]")) {
      const stopped = swept.filter((one) => one.action === "stopped").map((one) => one.id);
      const failed = swept.filter((one) => one.action === "failed");
      for (const one of failed) page.toast("bad", `${one.id}: ${one.detail}`);
      if (!failed.length) {
        page.toast("ok", stopped.length ? `${dialog.dataset.stopped} ${stopped.join(", ")}` : dialog.dataset.nothing);
      }
    }
  });

  function line(list, { id, action, detail }) {
    const item = document.createElement("li");
    const name = document.createElement("strong");
    name.textContent = id;
    const word = document.createElement("span");
    word.className = `tag ${action === "would_stop" ? "tag-warn" : ""}`;
    word.textContent = list.dataset[action] ?? action;
    item.append(name, " ", word, ` ${detail}`);
    return item;
  }
})();
