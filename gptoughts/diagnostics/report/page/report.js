"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const several = data.runs.length > 1;
  const hours = "hours", tokens = "tokens";
  let axis = "step", log = false, drawn = [];

  function color(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }

  function sums(deltas, divisor) {
    let sum = 0;
    return deltas.map(function (delta) { sum += delta; return sum / divisor; });
  }

  // Piecewise linear, and constant outside of the known range.
  function interpolated(xs, ys, at) {
    let low = 0, high = xs.length - 1;
    if (at <= xs[low]) return ys[low];
    if (at >= xs[high]) return ys[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= at) low = middle; else high = middle;
    }
    const width = xs[high] - xs[low];
    return width > 0 ? ys[low] + (ys[high] - ys[low]) * (at - xs[low]) / width : ys[high];
  }

  for (const run of data.runs) {
    for (const name of Object.keys(run.axes)) run.axes[name].x = sums(run.axes[name].x, name === "step" ? 10 : 1);
  }
  for (const chart of data.charts) {
    for (const line of chart.lines) line.x = sums(line.x, chart.clock ? 10 : 1);
  }

  // Return the x values of a line on the chosen axis, or null where the run has no such axis.
  function positions(chart, line) {
    const axes = data.runs[line.run].axes;
    if (chart.clock && axis === hours) return line.x.map(function (x) { return x / 3600; });
    let xs = line.x;
    if (chart.clock) {
      if (!axes.step) return null;
      xs = xs.map(function (x) { return interpolated(axes.step.x, axes.step.y, x); });
    }
    if (axis === "step") return xs;
    const map = axis === hours ? axes.seconds : axes.tokens;
    if (!map) return null;
    return xs.map(function (x) { return interpolated(map.x, map.y, x) / (axis === hours ? 3600 : 1); });
  }

  // Sort by x and move equal positions apart by less than a pixel: the chart takes one value per position.
  function ordered(xs, ys) {
    const places = xs.map(function (_, place) { return place; });
    places.sort(function (one, other) { return xs[one] - xs[other] || one - other; });
    const range = xs.length ? xs[places[places.length - 1]] - xs[places[0]] : 0;
    const least = (range || 1) * 1e-7;
    const sorted = [[], []];
    let before = -Infinity;
    for (const place of places) {
      before = Math.max(xs[place], before + least);
      if (before - xs[place] < least) before = xs[place] > sorted[0][sorted[0].length - 1] || !sorted[0].length ? xs[place] : before;
      sorted[0].push(before);
      sorted[1].push(ys[place]);
    }
    return sorted;
  }

  function short(value) {
    if (value == null) return "";
    const size = Math.abs(value);
    const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]];
    for (const unit of units) {
      if (size >= unit[0]) return +(value / (unit[1] === "k" ? 1e3 : unit[0])).toPrecision(5) + " " + unit[1];
    }
    return size !== 0 && size < 1e-5 ? value.toExponential(2) : String(+value.toPrecision(6));
  }

  function ticks(u, values) { return values.map(function (value) { return value == null ? "" : short(value); }); }

  function axisLabel(chart) {
    if (axis !== hours) return axis;
    return chart.clock ? "hours since the start (wall clock)" : "hours of training steps";
  }

  function series(chart, line, place) {
    const isEdge = line.role === "low" || line.role === "high";
    const number = line.role === "part" ? place : several ? line.run : place;
    const stroke = color("--c" + number % 10);
    const label = [several && line.role !== "part" ? data.runs[line.run].name : "", line.label].filter(Boolean).join(" ") || chart.title;
    const width = isEdge ? 1 : line.role === "marked" ? 2 : line.role === "faint" ? 1.2 : 1.5;
    return {
      label: label, stroke: isEdge ? stroke + "66" : line.role === "faint" && several ? stroke + "b0" : stroke, width: width,
      dash: number >= 10 ? [6, 3] : undefined, spanGaps: true,
      points: { show: line.role === "marked" || line.x.length < 30, size: 5, fill: stroke },
      value: function (u, value) { return value == null ? "–" : short(value) + (chart.unit ? " " + chart.unit : ""); }
    };
  }

  // A band is drawn between the highest and the lowest rank of a run.
  function bands(lines) {
    const found = [];
    lines.forEach(function (line, place) {
      const low = lines.findIndex(function (other) { return other.role === "low" && other.run === line.run; });
      if (line.role === "high" && low >= 0) {
        found.push({ series: [place + 1, low + 1], fill: color("--c" + (several ? line.run : 0) % 10) + "22" });
      }
    });
    return found;
  }

  function draw(chart, place) {
    const box = document.querySelector('[data-chart="' + place + '"]');
    box.textContent = "";
    const lines = [], values = [];
    for (const line of chart.lines) {
      const xs = positions(chart, line);
      if (xs && xs.length) { lines.push(line); values.push(ordered(xs, line.y)); }
    }
    box.dataset.lines = lines.length;
    if (!lines.length) { box.textContent = "no " + axis + " recorded for these curves"; return; }
    const positive = values.every(function (pair) { return pair[1].every(function (y) { return y > 0; }); });
    const ink = color("--ink"), grid = color("--grid");
    let main = -1;
    const shown = lines.map(function (line) {
      if (line.role !== "low" && line.role !== "high") main += 1;
      return series(chart, line, Math.max(main, 0));
    });
    const common = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "11px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
    const options = {
      width: box.clientWidth || 400, height: 230,
      scales: { x: { time: false }, y: { distr: log && positive ? 3 : 1 } },
      series: [{ label: axisLabel(chart), value: function (u, value) { return value == null ? "–" : short(value); } }].concat(shown),
      bands: bands(lines),
      axes: [
        Object.assign({}, common, { values: ticks, label: axisLabel(chart), labelSize: 18, size: 30, space: 70 }),
        Object.assign({}, common, {
          values: ticks, label: chart.unit || undefined, labelSize: 18,
          size: function (u, labels) { return 26 + 6.5 * Math.max.apply(null, (labels || [""]).map(function (one) { return (one || "").length; })); }
        })
      ],
      cursor: { sync: { key: chart.clock && axis === hours ? "clock" : axis }, drag: { x: true, y: false } }
    };
    drawn.push({ box: box, plot: new uPlot(options, values.length > 1 ? uPlot.join(values) : values[0], box) });
  }

  function drawAll() {
    for (const one of drawn) one.plot.destroy();
    drawn = [];
    data.charts.forEach(draw);
    root.dataset.charts = drawn.length;
  }

  const controls = document.querySelector(".controls");
  if (data.charts.length) controls.hidden = false;
  for (const input of document.querySelectorAll('input[name="axis"]')) {
    const known = input.value === "step" || data.runs.some(function (run) { return run.axes[input.value === hours ? "seconds" : tokens]; });
    input.disabled = !known;
    input.addEventListener("change", function () { axis = input.value; drawAll(); });
  }
  document.getElementById("log").addEventListener("change", function (event) { log = event.target.checked; drawAll(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  new ResizeObserver(function () {
    for (const one of drawn) {
      if (Math.abs(one.box.clientWidth - one.plot.width) > 1) one.plot.setSize({ width: one.box.clientWidth, height: 230 });
    }
  }).observe(document.querySelector("main"));
  drawAll();
})();
