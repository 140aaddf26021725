// Draws the figures of the page in its own colours, and again when these change between light and dark.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function template() {
  const line = colour("--line");
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, ticks: "outside", ticklen: 7, tickcolor: "rgba(0,0,0,0)" };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      hoverlabel: { bgcolor: colour("--inset"), bordercolor: colour("--line"), font: { color: colour("--text") }, align: "left" },
      xaxis: axis,
      yaxis: axis,
    },
  };
}

function draw(holder) {
  const figure = JSON.parse(document.getElementById(holder.dataset.figure).textContent);
  const layout = { ...figure.layout, template: template(), autosize: true };
  return Plotly.react(holder, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

function drawAll() {
  const holders = [...document.querySelectorAll("[data-figure]")];
  return Promise.all(holders.map(draw)).then(() => { document.body.dataset.drawn = holders.length; });
}

function say(problem) {
  const line = document.createElement("p");
  line.className = "failed";
  line.textContent = `A chart could not be drawn: ${problem}`;
  document.body.prepend(line);
  document.body.dataset.problem = problem;
}

window.addEventListener("error", (event) => say(event.message));
window.addEventListener("unhandledrejection", (event) => say(String(event.reason)));
dark.addEventListener("change", drawAll);
drawAll();
