// Draws the history of each card, and asks for it anew with every step. Unknown values are gaps, in charts and in tables.
"use strict";
(() => {
  const script = document.getElementById("gpus-script");
  const texts = JSON.parse(script.dataset.texts);
  const { span } = script.dataset;
  const isDay = span === "24h";
  const ADDRESS = `/api/runtime/compute/gpus/history?span=${span}`;
  const RETRY_MS = 5000;
  // The history has a step that is over; it may come a little later.
  const LATE_MS = 600;
  const ahead = Number(document.documentElement.dataset.now) * 1000 - Date.now();

  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_all, name) => values[name]);
  const whole = (unit) => (value) => `${Math.round(value)} ${unit}`;
  const WRITE = { memory: charts.size, utilisation: whole("%"), temperature: whole("°C"), power: whole("W") };
  const COLUMN = { utilisation: "utilisation_percent", temperature: "temperature_c", power: "power_watts" };
  const INK = { utilisation: "1", temperature: "3", power: "4" };
  const written = (name, value) => (value === null || value === undefined ? texts.unknown : WRITE[name](value));

  let history = null;
  const drawn = new WeakMap();

  // --- Numbers -------------------------------------------------------------------------------------------------

  // The series of a chart, each with its values by step. Those of memory stand on each other; what no process
  // accounts for is the last of them. Where the memory in use is unknown, all of them are.
  function seriesOf(name, card, fills) {
    if (name !== "memory") return [{ label: null, ink: INK[name], values: card[COLUMN[name]] }];
    const { other, ...processes } = card.processes;
    const named = [
      ...Object.entries(card.instances).map(([label, values]) => ({ label, ink: fills[label] ?? "gone", values })),
      ...Object.entries(processes).map(([label, values], place) => ({ label, ink: "foreign", fade: 1 / (1 + place * 0.6), values })),
    ];
    const rest = card.used_bytes.map((used, row) =>
      (used === null ? null : Math.max(0, used - named.reduce((sum, { values }) => sum + (values[row] ?? 0), 0))));
    const all = rest.some((value) => value > 0) ? [...named, { label: texts.other, ink: "foreign", fade: 0.35, values: rest }] : named;
    return all.length ? all : [{ label: texts.other, ink: "foreign", fade: 0.35, values: rest }];
  }

  function figures(values) {
    let [sum, count, highest] = [0, 0, null];
    for (const value of values) {
      if (value === null) continue;
      [sum, count] = [sum + value, count + 1];
      if (highest === null || value > highest) highest = value;
    }
    return { last: values.at(-1) ?? null, mean: count ? sum / count : null, highest, gaps: values.length - count };
  }

  // Sums from the first series on; the highest is drawn first, and the lower ones over it.
  function stacked(series, used) {
    let sums = used.map((value) => (value === null ? null : 0));
    return series.map(({ values }) => (sums = sums.map((sum, row) => (sum === null ? null : sum + (values[row] ?? 0))))).reverse();
  }

  // --- Drawing -------------------------------------------------------------------------------------------------

  // The colour of a class of the style sheet, in an SVG such as that of a legend.
  function keyOf({ ink, fade = 1 }) {
    const key = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    key.setAttribute("class", "key");
    key.setAttribute("viewBox", "0 0 10 10");
    key.setAttribute("aria-hidden", "true");
    const rect = document.createElementNS(key.namespaceURI, "rect");
    for (const [name, value] of Object.entries({ class: `fill-${ink}`, width: 10, height: 10, "fill-opacity": fade })) rect.setAttribute(name, value);
    key.append(rect);
    return key;
  }

  function colourOf(one, surface) {
    const key = keyOf(one);
    document.body.append(key);
    const [red, green, blue] = getComputedStyle(key.firstChild).fill.match(/[\d.]+/g).map(Number);
    key.remove();
    // Opaque, on the colour of the card: a lower series hides the higher one behind it.
    const mixed = [red, green, blue].map((part, place) => Math.round(part * (one.fade ?? 1) + surface[place] * (1 - (one.fade ?? 1))));
    return `rgb(${mixed.join(" ")})`;
  }

  const BINARY = Array.from({ length: 50 }, (_, power) => 2 ** power);
  // What the top of an axis is: all memory of the card, its power limit, or a little more than was seen.
  function topOf(name, card, limit) {
    const top = { memory: card.vram_total_bytes, utilisation: 100, temperature: 100, power: limit }[name];
    return (_plot, _low, high) => [0, Math.max(top ?? 0, high > (top ?? 0) ? high * 1.1 : 0) || 1];
  }

  // A value between two gaps has no line: it is a point.
  function alone(plot, number) {
    const values = plot.data[number];
    return values.flatMap((value, row) => (value !== null && (values[row - 1] ?? null) === null && (values[row + 1] ?? null) === null ? [row] : []));
  }

  function options(figure, shape) {
    const { name, series } = shape;
    const plot = figure.querySelector(".plot");
    const axis = charts.axis(plot);
    const surface = getComputedStyle(figure.closest(".card")).backgroundColor.match(/[\d.]+/g).map(Number);
    const isStack = name === "memory";
    const inks = (isStack ? series.toReversed() : series).map((one) => colourOf(one, surface));
    return {
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, sync: { key: figure.closest("[data-charts]").id }, points: { show: !isStack, size: 7 } },
      scales: { x: { range: () => shape.reach }, y: { range: (...all) => shape.top(...all) } },
      axes: [
        { ...axis, grid: { show: false }, size: 28, space: 56, gap: 8,
          values: (_plot, ticks) => ticks.map((tick) => clock(tick)) },
        { ...axis, size: isStack ? 72 : 56, space: isStack ? 36 : 28, incrs: isStack ? BINARY : undefined,
          values: (_plot, ticks) => ticks.map((tick) => (isStack ? charts.size(tick).replace(".0 ", " ") : WRITE[name](tick))) },
      ],
      series: [{}, ...inks.map((colour) => ({
        stroke: colour, fill: isStack ? colour : undefined, width: isStack ? 1 : 1.5, spanGaps: false,
        points: { show: false, filter: alone, size: 4, fill: colour },
      }))],
      hooks: { setCursor: [({ cursor }) => read(figure, cursor.left >= 0 ? cursor.idx : null)] },
    };
  }

  const clock = (second) => new Date(second * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", hour12: false });

  // The legend has the values under the pointer, and the last ones without it.
  function read(figure, row) {
    const shape = drawn.get(figure);
    if (!shape) return;
    const at = row === null || row === undefined ? shape.times.length - 1 : row;
    const values = shape.readings.map((one) => written(shape.name, one[at]));
    figure.querySelectorAll(".reading").forEach((reading, place) => {
      if (reading.textContent !== values[place]) reading.textContent = values[place];
    });
    figure.querySelector("[data-at]").textContent = at === row ? new Date(shape.times[at] * 1000).toLocaleTimeString([], { hour12: false }) : "";
  }

  function item(label, value, key) {
    const line = document.createElement("li");
    const words = document.createElement("span");
    words.className = "truncate";
    words.textContent = label;
    const reading = document.createElement("strong");
    reading.className = value === undefined ? "reading" : "fixed";
    reading.textContent = value ?? "";
    line.append(...(key ? [key] : []), words, " ", reading);
    return line;
  }

  function legendOf({ name, series, facts }) {
    if (name === "memory") return [item(texts.total), ...series.map((one) => item(one.label, undefined, keyOf(one)))];
    const { mean, highest } = facts[0];
    return [item(texts.last, undefined, keyOf(series[0])), item(texts.mean, written(name, mean)), item(texts.highest, written(name, highest))];
  }

  function rowOf(name, label, { last, mean, highest, gaps }) {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.className = "break";
    head.textContent = label;
    row.append(head, ...[last, mean, highest].map((value) => cell(written(name, value))), cell(String(gaps)));
    return row;
  }

  function cell(text) {
    const made = document.createElement("td");
    made.className = "num";
    made.textContent = text;
    return made;
  }

  // Everything that a figure shows of a card. A chart with the same series gets new numbers; others are drawn anew.
  function show(figure, card, fills, limit, isRepaint) {
    const name = figure.dataset.chart;
    const { title } = figure.dataset;
    const series = seriesOf(name, card, fills);
    const isStack = name === "memory";
    const facts = series.map(({ values }) => figures(values));
    const all = isStack ? figures(card.used_bytes) : facts[0];
    const end = Math.max(card.times.at(-1) + history.step_s, Math.floor((Date.now() + ahead) / 1000 / history.step_s) * history.step_s);
    const shape = {
      name, series, facts, times: card.times, reach: [end - history.span_s, end], top: topOf(name, card, limit),
      readings: isStack ? [card.used_bytes, ...series.map(({ values }) => values)] : [series[0].values],
      looks: JSON.stringify(series.map(({ label, ink, fade }) => [label, ink, fade])),
    };
    const before = drawn.get(figure);
    drawn.set(figure, before ? Object.assign(before, shape, { isSame: before.looks === shape.looks }) : shape);
    const kept = drawn.get(figure);
    const isNew = isRepaint || !before || !kept.isSame;
    if (isNew || !isStack) figure.querySelector(".legend").replaceChildren(...legendOf(shape));
    const rows = series.map((one, place) => rowOf(name, one.label ?? title, facts[place]));
    figure.querySelector("tbody").replaceChildren(...(isStack ? [rowOf(name, texts.total, all)] : []), ...rows);
    const plot = figure.querySelector(".plot");
    plot.setAttribute("aria-label", fill(texts.summary, {
      title, last: written(name, all.last), mean: written(name, all.mean), highest: written(name, all.highest),
    }));
    // A card that told nothing has no chart: an empty one would look like zero.
    const isSilent = all.highest === null;
    plot.hidden = isSilent;
    figure.querySelector("[data-none]").hidden = !isSilent;
    const chart = charts.of(plot);
    if (plot.clientWidth) {
      const data = [card.times, ...(isStack ? stacked(series, card.used_bytes) : [series[0].values])];
      if (isNew || !chart) charts.draw(plot, options(figure, kept), data);
      else chart.setData(data);
    }
    const { idx, left } = charts.of(plot)?.cursor ?? { left: -1 };
    read(figure, left >= 0 ? idx : null);
  }

  function showAll(isRepaint = false) {
    if (!history) return;
    const fills = JSON.parse(document.getElementById("gpus-notice").dataset.fills);
    for (const place of document.querySelectorAll("[data-charts]")) {
      const { uuid, limit } = document.getElementById(place.dataset.charts).dataset;
      const card = history.gpus.find((one) => one.uuid === uuid);
      const says = card ? "" : isDay ? texts.waiting_day : fill(texts.waiting, { step: history.step_s });
      if (place.querySelector("[data-says]").textContent !== says) place.querySelector("[data-says]").textContent = says;
      for (const figure of place.querySelectorAll("figure")) {
        figure.hidden = !card;
        if (card) show(figure, card, fills, limit ? Number(limit) : null, isRepaint);
      }
    }
  }

  // --- The history ---------------------------------------------------------------------------------------------

  let timer = null;
  let isAsking = false;

  async function ask() {
    if (isAsking) return;
    clearTimeout(timer);
    isAsking = true;
    let next = RETRY_MS;
    try {
      const answer = await fetch(ADDRESS, { signal: AbortSignal.timeout(20000) });
      if (answer.status === 401) { window.page.signedOut(); return; }
      if (!answer.ok) throw new Error(String(answer.status));
      history = await answer.json();
      showAll();
      const step = history.step_s * 1000;
      next = step - ((Date.now() + ahead) % step) + LATE_MS;
      // A day begins with the end of its first minute.
      if (!history.gpus.length) next = Math.min(next, RETRY_MS);
    } catch {
      for (const says of document.querySelectorAll("[data-says]")) says.textContent = texts.failed;
    } finally {
      isAsking = false;
    }
    if (!document.hidden) timer = setTimeout(ask, next);
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : ask()));
  // A card that has come is drawn at once.
  document.addEventListener("htmx:after:swap", () => {
    if ([...document.querySelectorAll("[data-charts]")].some((place) => !drawn.has(place.querySelector("figure")))) showAll();
  });
  charts.onTheme(() => showAll(true));
  ask();
})();
