// The hits of a query, and the way back to the list after a collection was deleted.
"use strict";
(() => {
  const MOST_CHARACTERS = 500;
  const place = () => document.getElementById("hits");

  document.addEventListener("htmx:before:request", ({ detail: { ctx } }) => {
    // A refusal does not stand over the hits of an earlier query.
    if (ctx.sourceElement.matches("[data-query]")) place().replaceChildren();
  });

  document.addEventListener("api:done", ({ target, detail: { answer } }) => {
    if (target.dataset.to) location.assign(target.dataset.to);
    if (target.matches("[data-query]")) show(answer, JSON.parse(place().dataset.texts));
  });

  const made = (tag, text = "", kind = "") => Object.assign(document.createElement(tag), { textContent: text, className: kind });
  const filled = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);

  // A version that is not the active one is marked, once above the hits and at each of them.
  function show({ version, active, state, model, coverage, items }, texts) {
    if (version === null) {
      place().replaceChildren(made("p", texts.no_version));
      return;
    }
    const mark = () => (active ? [] : [" ", made("span", texts[state] ?? state, "tag tag-warn")]);
    const said = made("p", filled(texts.summary, { count: items.length, version, model: model ?? "" }), "small");
    said.append(...mark());
    const lines = [said];
    if (coverage < 1) lines.push(made("p", texts.incomplete, "small muted"));
    if (items.length) lines.push(table(items, texts, mark));
    place().replaceChildren(...lines);
  }

  function table(items, texts, mark) {
    const scroll = made("div", "", "scroll");
    Object.assign(scroll, { tabIndex: 0, role: "region", ariaLabel: texts.label });
    const found = made("table", "", "table");
    const head = found.createTHead().insertRow();
    for (const name of ["score", "id", "metadata", "version"]) head.append(made("th", texts[name], name === "score" ? "num" : ""));
    const body = found.createTBody();
    for (const { id, score, metadata, embedding_version: version } of items) {
      const json = JSON.stringify(metadata);
      const of = made("td");
      of.append(made("code", version), ...mark());
      body.insertRow().append(
        made("td", score.toFixed(4), "num"),
        made("td", id, "break mono"),
        made("td", json.length > MOST_CHARACTERS ? `${json.slice(0, MOST_CHARACTERS)}…` : json, "break mono"),
        of,
      );
    }
    scroll.append(found);
    return scroll;
  }
})();
