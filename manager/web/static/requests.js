// The history grows at its top, and never under the reader: not while a pointer, the focus or a selection is in it.
"use strict";
(() => {
  const SHORTEST_MS = 1000;
  const history = () => document.getElementById("requests-history");
  const body = () => document.getElementById("requests-rows");
  let paused = false;
  let held = [];
  let seen = pulse();
  let timer = null;
  let asking = false;

  function pulse() { return document.getElementById("requests-pulse")?.dataset.newest ?? ""; }
  function isFirst() { return history()?.dataset.first === "yes"; }
  function most() { return Number(history().dataset.most); }

  function isRead() {
    const list = body();
    const selection = getSelection();
    return list.matches(":hover") || list.contains(document.activeElement)
      || (!selection.isCollapsed && list.contains(selection.anchorNode));
  }

  // --- New rows ------------------------------------------------------------------------------------------------

  function look() {
    if (timer === null && !paused && isFirst() && pulse() !== seen) timer = setTimeout(ask, SHORTEST_MS);
  }

  async function ask() {
    timer = null;
    if (asking || paused || document.hidden || !isFirst()) return;
    const list = history();
    const [cursor, query] = [list.dataset.cursor, list.dataset.query];
    const newest = pulse();
    asking = true;
    try {
      const answer = await fetch(`/ui/requests?${query ? `${query}&` : ""}after=${cursor}`);
      if (!answer.ok || list.dataset.cursor !== cursor) return;
      const found = new DOMParser().parseFromString(await answer.text(), "text/html");
      const rows = [...found.querySelectorAll("#requests-rows > tr")];
      seen = newest;
      if (rows.length >= most() && !isRead()) {
        held = [];
        await page.refresh();
        return;
      }
      list.dataset.cursor = found.getElementById("requests-history").dataset.cursor;
      held = [...rows, ...held].slice(0, most());
      show();
    } catch {
      // The live channel says that the daemon is away; its next news come here again.
    } finally {
      asking = false;
      look();
    }
  }

  function show(always = false) {
    if (held.length && (always || (!paused && !isRead()))) {
      const list = body();
      const fresh = held.filter((one) => !document.getElementById(one.id));
      list.prepend(...fresh.map((one) => document.adoptNode(one)));
      while (list.rows.length > most()) list.lastElementChild.remove();
      held = [];
      list.closest("table").classList.remove("bare");
      document.getElementById("requests-empty")?.remove();
      tell();
    }
    count();
  }

  function count() {
    const button = document.querySelector("[data-news]");
    if (!button) return;
    button.dataset.none ??= button.textContent;
    const { none, one, many } = button.dataset;
    const number = held.length >= most() ? `${most()}+` : held.length;
    const text = held.length === 0 ? none : held.length === 1 ? one : many.replace("{count}", number);
    if (button.textContent !== text) button.textContent = text;
    button.disabled = held.length === 0;
  }

  document.addEventListener("click", ({ target }) => {
    const pause = target.closest?.("[data-pause]");
    if (pause) {
      paused = !paused;
      pause.setAttribute("aria-pressed", String(paused));
      look();
    }
    if (target.closest?.("[data-news]")) show(true);
    const row = target.closest?.("#requests-rows > tr, #requests-open tbody > tr");
    if (row && !target.closest("a, button") && getSelection().isCollapsed) row.querySelector("a")?.click();
  });
  document.addEventListener("pointerout", ({ target }) => {
    if (held.length && target.closest?.("#requests-rows")) setTimeout(show);
  });
  document.addEventListener("focusout", ({ target }) => {
    if (held.length && target.closest?.("#requests-rows")) setTimeout(show);
  });
  document.addEventListener("selectionchange", () => { if (held.length) setTimeout(show); });
  document.addEventListener("visibilitychange", look);

  // --- What the filters leave of the open requests ---------------------------------------------------------------

  const same = { model: (one) => one.replace(/:latest$/, "") };

  function filter() {
    const list = history();
    if (!list?.dataset.query) return;
    const wanted = new URLSearchParams(list.dataset.query);
    const rows = [...document.querySelectorAll("#requests-open tbody > tr")];
    for (const row of rows) {
      row.hidden = ["project", "role", "model", "instance", "key"].some((name) => {
        const plain = same[name] ?? ((one) => one);
        return wanted.has(name) && plain(row.dataset[name]) !== plain(wanted.get(name));
      });
    }
    const none = document.querySelector("#requests-open [data-no-match]");
    if (none) none.hidden = rows.some((row) => !row.hidden);
  }

  // --- Times ---------------------------------------------------------------------------------------------------

  function tell() {
    const today = new Date().toDateString();
    for (const time of document.querySelectorAll("time[data-when]:empty")) {
      const at = new Date(Number(time.dataset.when) * 1000);
      const clock = at.toLocaleTimeString(undefined, { hour12: false });
      time.dateTime = at.toISOString();
      time.title = at.toLocaleString();
      time.textContent = at.toDateString() === today ? clock
        : `${at.toLocaleDateString(undefined, { day: "numeric", month: "short" })} ${clock}`;
    }
  }

  // An open request that is explained goes on.
  setInterval(() => {
    if (!document.hidden && document.querySelector("[data-open-request]")) page.refresh();
  }, 1000);

  document.addEventListener("htmx:after:swap", () => { tell(); filter(); look(); });
  tell();
  filter();
})();
