// What the charts of several pages share: their ink, their axes, and when they are drawn anew.
"use strict";
(() => {
  // Bytes as `words.size` of the server writes them.
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  function size(count) {
    let [value, unit] = [count, 0];
    while (Math.abs(value) >= 1024 && unit < UNITS.length - 1) [value, unit] = [value / 1024, unit + 1];
    return `${value.toFixed(unit === 0 || Math.abs(value) >= 100 ? 0 : 1)} ${UNITS[unit]}`;
  }

  // An axis in the colours of the theme: the text of the plot, and its lines in that of the border.
  function axis(plot) {
    const { color } = getComputedStyle(plot);
    const line = getComputedStyle(document.documentElement).getPropertyValue("--line");
    const probe = document.createElement("i");
    probe.style.color = line;
    plot.append(probe);
    const stroke = getComputedStyle(probe).color;
    probe.remove();
    return { stroke: color, font: "12px system-ui, sans-serif", grid: { stroke, width: 1 }, ticks: { show: false } };
  }

  const charts = new WeakMap();
  const watched = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      const chart = charts.get(target);
      if (chart && target.clientWidth && chart.width !== target.clientWidth) {
        chart.setSize({ width: target.clientWidth, height: target.clientHeight });
      }
    }
  });

  // Draws into an element in the place of what it shows; the chart follows the width of the element.
  function draw(element, options, data) {
    charts.get(element)?.destroy();
    charts.delete(element);
    const chart = new uPlot({ ...options, width: element.clientWidth, height: element.clientHeight }, data, element);
    charts.set(element, chart);
    watched.observe(element);
    return chart;
  }

  // Calls back when the colours have changed.
  function onTheme(listen) {
    document.addEventListener("theme", listen);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", listen);
  }

  window.charts = { axis, draw, of: (element) => charts.get(element), onTheme, size };
})();
