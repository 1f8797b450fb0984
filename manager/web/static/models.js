// The list of models: search and sort, on this side. Both are part of the address, so that a reload keeps them.
"use strict";
(() => {
  const find = (id) => document.getElementById(id);
  const given = new URLSearchParams(location.search);
  const wanted = { q: given.get("q") ?? "", sort: given.get("sort") ?? "name" };

  const by = {
    name: () => 0,
    size: (a, b) => Number(b.size) - Number(a.size),
    used: (a, b) => Number(b.used) - Number(a.used),
    state: (a, b) => Number(a.rank) - Number(b.rank),
  };

  const rowOf = (item) => item.querySelector(".model").dataset;

  // All words that were typed, in any order.
  function filter() {
    const list = find("models");
    if (!list) return;
    const words = wanted.q.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const item of list.children) {
      const text = rowOf(item).find;
      item.hidden = !words.every((word) => text.includes(word));
      if (!item.hidden) shown += 1;
    }
    const count = find("models-count");
    const text = words.length ? `${shown} ${count.dataset.of} ${list.children.length}` : String(list.children.length);
    if (count.textContent !== text) count.textContent = text;
    find("models-none").hidden = shown > 0;
  }

  // Rows move when a person asks for it, or when rows come and go: not while values change.
  function sort() {
    const list = find("models");
    if (!list) return;
    const compare = by[wanted.sort] ?? by.name;
    const items = [...list.children];
    const sorted = items.toSorted((one, other) => {
      const [a, b] = [rowOf(one), rowOf(other)];
      return compare(a, b) || a.name.localeCompare(b.name);
    });
    if (sorted.some((item, place) => item !== items[place])) list.append(...sorted);
  }

  function remember() {
    const query = new URLSearchParams();
    if (wanted.q) query.set("q", wanted.q);
    if (wanted.sort !== "name") query.set("sort", wanted.sort);
    history.replaceState(null, "", location.pathname + (query.size ? `?${query}` : ""));
  }

  function apply() {
    const [search, order] = [find("models-search"), find("models-sort")];
    if (search.value !== wanted.q) search.value = wanted.q;
    if (order.value !== wanted.sort) order.value = wanted.sort in by ? wanted.sort : "name";
    sort();
    filter();
  }

  document.addEventListener("input", ({ target }) => {
    if (target.id !== "models-search") return;
    wanted.q = target.value;
    remember();
    filter();
  });
  document.addEventListener("change", ({ target }) => {
    if (target.id !== "models-sort") return;
    wanted.sort = target.value;
    remember();
    sort();
  });
  document.addEventListener("htmx:after:swap", apply);
  document.addEventListener("api:done", ({ target }) => {
    if (target.matches("form[data-api]")) target.reset();
  });
  apply();
})();
