// Draws the charts of the page of usage, each from the table in its figure.
"use strict";
(() => {
  const thousands = (number) => Math.round(number).toLocaleString("en").replaceAll(",", "\u202f");

  // As the filters of the server write values (`words.py`); axes are shorter.
  const AXES = {
    count: (value) => (value >= 1e6 ? `${+(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : thousands(value)),
    usd: (value) => `$${value !== 0 && value < 0.1 ? +value.toPrecision(2) : value.toFixed(2)}`,
    ms: (value) => (value < 1000 ? `${Math.round(value)} ms` : `${+(value / 1000).toFixed(1)} s`),
    percent: (value) => `${+(value * 100).toFixed(1)} %`,
  };

  // The numbers of a table: seconds, and a list for each column; null is unknown.
  function read(figure) {
    const rows = [...figure.querySelectorAll("tbody tr")];
    const seconds = rows.map((row) => Number(row.querySelector("th").dataset.second));
    const width = rows[0].querySelectorAll("td").length;
    const columns = Array.from({ length: width }, (_, place) =>
      rows.map((row) => {
        const { value } = row.querySelectorAll("td")[place].dataset;
        return value === undefined ? null : Number(value);
      }));
    return { rows, seconds, columns };
  }

  // Bars stand on those before them: the series are sums, and the largest is drawn first.
  function stacked(columns) {
    const sums = columns.map((column) => column.slice());
    for (let place = 1; place < sums.length; place += 1) {
      sums[place] = sums[place].map((value, row) => (value ?? 0) + (sums[place - 1][row] ?? 0));
    }
    return sums.reverse();
  }

  function options(figure, { seconds, columns, rows }) {
    const { kind, unit, step } = { kind: figure.dataset.chart, unit: figure.dataset.unit, step: Number(figure.dataset.step) };
    const series = [...figure.querySelectorAll(".key rect")].map((rect) => getComputedStyle(rect).fill);
    const isBars = kind === "bars";
    const ink = isBars ? series.toReversed() : series;
    const end = seconds.at(-1) + step;
    const axis = charts.axis(figure.querySelector(".plot"));
    return {
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false }, points: { show: !isBars } },
      tzDate: (second) => uPlot.tzDate(new Date(second * 1000), "Etc/UTC"),
      scales: {
        x: { range: () => [seconds[0], end] },
        y: { range: (_plot, _low, high) => [0, (high || 1) * 1.1] },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 24, space: 64, incrs: [3600, 7200, 14400, 21600, 43200, 86400, 172800, 432000, 604800, 1209600, 2592000, 7776000],
          values: (_plot, ticks, _axis, _space, gap) => ticks.map((tick) => {
            const iso = new Date(tick * 1000).toISOString();
            return gap < 86400 ? iso.slice(11, 16) : iso.slice(5, 10);
          }) },
        { ...axis, size: (plot, values) => widthOf(plot, values, axis.font), space: 36, values: (_plot, ticks) => ticks.map((tick) => AXES[unit](tick)),
          incrs: unit === "count" ? [1, 2, 5].flatMap((one) => Array.from({ length: 13 }, (_, ten) => one * 10 ** ten)).sort((a, b) => a - b) : undefined },
      ],
      series: [{}, ...ink.map((colour) => ({
        stroke: colour,
        fill: isBars ? colour : undefined,
        width: isBars ? 0 : 2,
        paths: isBars ? uPlot.paths.bars({ size: [0.8, 48], align: 1 }) : undefined,
        points: { show: !isBars && (columns[0].filter((value) => value !== null).length < 60), size: 6, fill: colour },
      }))],
      hooks: { setCursor: [(plot) => tell(figure, rows, plot.cursor.left < 0 ? null : plot.posToIdx ? place(plot, seconds, step, isBars) : null)] },
    };
  }

  // The width of an axis: that of its longest value.
  function widthOf(plot, values, font) {
    if (!values) return 56;
    plot.ctx.save();
    plot.ctx.font = font;
    const longest = Math.max(...values.map((value) => plot.ctx.measureText(value ?? "").width));
    plot.ctx.restore();
    return Math.max(56, Math.ceil(longest) + 16);
  }

  // The row under the pointer: bars begin at their second.
  function place(plot, seconds, step, isBars) {
    const at = plot.posToVal(plot.cursor.left, "x") - (isBars ? 0 : -step / 2);
    const found = Math.floor((at - seconds[0]) / step);
    return found >= 0 && found < seconds.length ? found : null;
  }

  // The legend shows the values under the pointer, and those of the whole time without one.
  function tell(figure, rows, row) {
    const cells = row === null ? [] : rows[row].querySelectorAll("td");
    figure.querySelectorAll(".reading").forEach((reading, number) => {
      reading.textContent = cells[number]?.textContent ?? reading.dataset.reading;
    });
    figure.querySelector("[data-at]").textContent = row === null ? "" : rows[row].querySelector("th").textContent;
  }

  function draw(figure) {
    const plot = figure.querySelector(".plot");
    if (!plot || !plot.clientWidth) return;
    const table = read(figure);
    charts.draw(plot, options(figure, table), [table.seconds, ...(figure.dataset.chart === "bars" ? stacked(table.columns) : table.columns)]);
  }

  function drawAll() {
    for (const figure of document.querySelectorAll("[data-chart]")) draw(figure);
  }

  // Only new numbers are drawn anew.
  let last = "";
  function renew() {
    const numbers = [...document.querySelectorAll("[data-chart] tbody")].map((body) => body.innerHTML).join();
    if (numbers === last) return;
    last = numbers;
    drawAll();
  }

  // The dates count for a time of one's own only. Without this script they are always there.
  function showDates() {
    const isCustom = document.getElementById("usage-span").value === "custom";
    for (const field of document.querySelectorAll("[data-custom]")) {
      field.hidden = !isCustom;
      field.querySelector("input").disabled = !isCustom;
    }
  }

  document.addEventListener("change", ({ target }) => {
    const form = target.closest("#usage-filter");
    if (!form) return;
    showDates();
    if (target.matches("select") && document.getElementById("usage-span").value !== "custom") form.requestSubmit();
  });
  document.addEventListener("htmx:after:swap", () => { showDates(); renew(); });
  charts.onTheme(drawAll);
  showDates();
  renew();
})();
