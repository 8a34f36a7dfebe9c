"use strict";
// The figures of the page, drawn in the colors of its scheme; the legend; the pager of pictures.
// Each has a contrast of 3 to 1 or more with the page.
const ON_LIGHT = ["#2f76ea", "#d9610a", "#0d8f69", "#d92f50", "#9550ea", "#a07a00", "#0588a3",
                  "#64870a", "#cf3d88", "#7d736a"];
const ON_DARK = ["#4c8ff8", "#f58a3c", "#1dbb8b", "#f0566f", "#b07bf7", "#d3a70f", "#16b1d0",
                 "#8bb31c", "#ea69ad", "#9c9288"];
const figures = JSON.parse(document.getElementById("figures").textContent);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set();

const colors = () => (scheme.matches ? ON_DARK : ON_LIGHT);
const colorOf = (group) => colors()[group % colors().length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function dressed(trace, isOnlyPoint) {
  const color = colorOf(trace.group ?? 0);
  const shown = { ...trace, visible: !hidden.has(trace.group) };
  delete shown.role;
  delete shown.group;
  if (trace.role === "line") {
    shown.line = { color, width: 2, ...(trace.line || {}) };
    shown.marker = { color, size: 7 };
    if (isOnlyPoint) shown.mode = "lines+markers";
  } else if (trace.role === "band") {
    shown.fillcolor = color + "33";
    shown.line = { width: 0 };
  } else if (trace.role === "bar") {
    shown.marker = { color };
  } else if (trace.role === "dots") {
    shown.marker = { color, size: 9 };
    shown.cliponaxis = false;
  } else if (trace.role === "guide") {
    shown.line = { color: css("--pale"), dash: "dash", width: 1 };
  } else if (trace.role === "table") {
    // Mistakes are a few percent: they take the first half of the colors.
    const few = scheme.matches ? "#3b5f8a" : "#8fb8e8";
    shown.colorscale = [[0, css("--card")], [0.15, few], [1, css("--accent")]];
    shown.colorbar = { ...trace.colorbar, tickfont: { color: css("--pale") } };
  }
  for (const axis of ["error_x", "error_y"]) {
    const ink = trace.role === "bar" ? css("--text") : color;
    if (trace[axis]) shown[axis] = { ...trace[axis], color: ink, thickness: 1, width: 3 };
  }
  return shown;
}

function layoutOf(figure, choice, width) {
  const layout = JSON.parse(JSON.stringify(choice.layout));
  for (const axis of ["xaxis", "yaxis"]) {
    Object.assign(layout[axis], {
      gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"),
      automargin: true,
    });
    layout[axis].title = { ...layout[axis].title, font: { size: 12 }, standoff: 8 };
  }
  for (const line of layout.shapes || []) line.line = { color: css("--pale"), dash: "dot", width: 1 };
  for (const name of layout.annotations || []) name.font = { color: css("--pale"), size: 11 };
  return {
    showlegend: false, ...layout, height: figure.height, width,
    margin: { l: 10, r: 14, t: layout.annotations ? 20 : 14, b: 10 }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), size: 12 },
    hovermode: "closest", colorway: [2, 3, 0].map(colorOf),
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
  };
}

function draw(figure) {
  const place = document.getElementById("plot-" + figure.key);
  const select = document.getElementById("choice-" + figure.key);
  const choice = figure.choices[select ? select.selectedIndex : 0];
  const traces = choice.traces.map((trace) => dressed(trace, (trace.x || []).length === 1));
  return Plotly.react(place, traces, layoutOf(figure, choice, place.clientWidth), {
    displaylogo: false, displayModeBar: false, responsive: false,
  });
}

function drawAll() {
  for (const button of document.querySelectorAll("#legend button")) {
    button.querySelector("i").style.background = colorOf(Number(button.dataset.group));
  }
  return Promise.all(figures.map(draw));
}

for (const figure of figures) {
  const select = document.getElementById("choice-" + figure.key);
  if (select) select.addEventListener("change", () => draw(figure));
}

for (const button of document.querySelectorAll("#legend button")) {
  const group = Number(button.dataset.group);
  button.addEventListener("click", () => {
    if (!hidden.delete(group)) hidden.add(group);
    button.setAttribute("aria-pressed", String(!hidden.has(group)));
    drawAll();
  });
}

let lastWidth = window.innerWidth;
let timer = 0;
window.addEventListener("resize", () => {
  if (window.innerWidth === lastWidth) return;  // phones change the height while they scroll
  lastWidth = window.innerWidth;
  clearTimeout(timer);
  timer = setTimeout(drawAll, 150);
});
scheme.addEventListener("change", drawAll);

const albums = JSON.parse(document.getElementById("pictures").textContent);
if (albums.length) {
  const find = (id) => document.getElementById(id);
  let place = 0;
  const album = () => albums[find("album").selectedIndex];
  const show = (next) => {
    const count = album().pictures.length;
    place = (next + count) % count;
    const picture = album().pictures[place];
    find("truth").src = picture.truth;
    find("found").src = picture.found;
    find("picture-text").textContent = `${place + 1} of ${count}: ${picture.text}`;
  };
  find("album").addEventListener("change", () => show(0));
  for (const image of document.querySelectorAll(".pair img")) {
    image.addEventListener("click", () => image.closest(".pair").classList.toggle("large"));
  }
  find("before").addEventListener("click", () => show(place - 1));
  find("after").addEventListener("click", () => show(place + 1));
  find("pager").addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT") return;
    if (event.key === "ArrowLeft") show(place - 1);
    if (event.key === "ArrowRight") show(place + 1);
  });
  show(0);
}

drawAll().then(() => { document.body.dataset.drawn = "yes"; });
