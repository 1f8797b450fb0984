// A region with `data-polls` is fetched again: often or seldom, while it is looked at and nobody fills in a dialog.
"use strict";
(() => {
  const WAITS_MS = { often: 1500, seldom: 10000 };
  let last = Date.now();

  setInterval(() => {
    const wait = WAITS_MS[document.querySelector("[data-polls]")?.dataset.polls] ?? Infinity;
    if (document.hidden || document.querySelector("dialog[open]") || Date.now() - last < wait) return;
    last = Date.now();
    page.refresh();
  }, 500);
})();
