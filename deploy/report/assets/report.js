"use strict";
// Optional on the page: reads values off the charts and walks through the tokens.

for (const chart of document.querySelectorAll("svg.lines")) {
  const [low, high, start, end] = JSON.parse(chart.dataset.x);
  const series = JSON.parse(chart.dataset.series);
  const xs = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const cursor = chart.querySelector(".cursor");
  const readout = chart.closest("figure").querySelector(".readout");
  let index = xs.length - 1;

  const show = () => {
    const x = xs[index];
    const at = start + ((x - low) / (high - low)) * (end - start);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
    const values = series.flatMap((one) => {
      const point = one.points.find((found) => found[0] === x);
      return point ? [`${one.name} ${point[1]}`] : [];
    });
    readout.textContent = `${chart.dataset.xLabel} ${x}: ${values.join(" · ")}`;
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  };

  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
    const x = low + ((at - start) / (end - start)) * (high - low);
    index = xs.reduce((best, one, other) => (Math.abs(one - x) < Math.abs(xs[best] - x) ? other : best), 0);
    show();
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("focus", show);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const moved = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: xs.length - 1 }[event.key];
    if (moved === undefined) return;
    event.preventDefault();
    index = Math.min(Math.max(moved, 0), xs.length - 1);
    show();
  });
}

for (const group of document.querySelectorAll(".tokens")) {
  const tokens = [...group.children];
  const readout = group.parentElement.querySelector(".readout");
  const describe = (token) => { readout.textContent = token.dataset.description; };

  group.addEventListener("pointerover", (event) => { if (event.target !== group) describe(event.target); });
  group.addEventListener("focusin", (event) => {
    for (const token of tokens) token.tabIndex = token === event.target ? 0 : -1;
    describe(event.target);
  });
  group.addEventListener("click", (event) => { if (event.target !== group) event.target.focus(); });
  group.addEventListener("keydown", (event) => {
    const here = tokens.indexOf(document.activeElement);
    const there = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (here < 0 || there === undefined) return;
    event.preventDefault();
    tokens[Math.min(Math.max(there, 0), tokens.length - 1)].focus();
  });
}
