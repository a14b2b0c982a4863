// Shows the values under the pointer. The page is complete without this script.
"use strict";
const shown = (value) => (Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(value));

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = i; });
  return best;
}

function linesAt(hover, x) {
  return hover.curves.map((curve) => {
    const i = nearest(curve.x, x);
    return `${curve.name} ${curve.y[i] === null ? "NaN" : shown(curve.y[i])} at ${shown(curve.x[i])}`;
  }).join(" · ");
}

function heatAt(hover, x, y) {
  const row = Math.floor((y - hover.top) / hover.row), column = nearest(hover.columns, x);
  if (row < 0 || row >= hover.rows.length) return "";
  const value = hover.z[row][column];
  return `layer ${hover.rows[row]}, ${hover.name} ${shown(hover.columns[column])}: ${value === null ? "none" : shown(value)}`;
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const hover = JSON.parse(figure.dataset.hover);
  const picture = figure.querySelector(":scope > svg"), cursor = picture.querySelector(".cursor"), output = figure.querySelector("output");
  const show = (event) => {
    const box = picture.getBoundingClientRect(), scale = hover.width / box.width;
    const plot = hover.width - hover.left - hover.right;
    const place = Math.min(1, Math.max(0, ((event.clientX - box.left) * scale - hover.left) / plot));
    const x = hover.x[0] + place * (hover.x[1] - hover.x[0]);
    output.textContent = hover.kind === "lines" ? linesAt(hover, x) : heatAt(hover, x, (event.clientY - box.top) * scale);
    const at = hover.left + place * plot;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.setAttribute("visibility", "visible");
  };
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", () => {
    output.textContent = "\u00a0";
    cursor.setAttribute("visibility", "hidden");
  });
}

// Touch screens have no hover, so a token's title is also written under the text.
for (const text of document.querySelectorAll(".text")) {
  const output = text.parentElement.querySelector("output");
  const show = (event) => { if (event.target.title) output.textContent = event.target.title; };
  text.addEventListener("pointerover", show);
  text.addEventListener("pointerdown", show);
}
