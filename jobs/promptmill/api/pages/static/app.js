// Plots, drag and drop, and a word when the server is away. Everything else is HTML.
"use strict";
(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const palette = ["--accent", "--good", "--warn", "--bad", "--dim"];
  const plots = {};

  const empty = (node, text) => {
    if (plots[node.id]) { plots[node.id].destroy(); delete plots[node.id]; }
    node.replaceChildren(Object.assign(document.createElement("p"), { textContent: text }));
  };

  const draw = (node, series, data, scales, xLabel) => {
    const shape = JSON.stringify(series.map((each) => each.label));
    if (plots[node.id] && plots[node.id].shape === shape) { plots[node.id].setData(data); return; }
    node.replaceChildren();
    if (plots[node.id]) plots[node.id].destroy();
    const axis = { stroke: colour("--dim"), grid: { stroke: colour("--rule"), width: 1 }, ticks: { stroke: colour("--rule") } };
    plots[node.id] = new uPlot({
      width: Math.max(240, node.clientWidth), height: 200, scales, legend: { show: series.length > 2 },
      series, axes: [{ ...axis, label: xLabel, labelSize: 18, labelGap: 0 }, { ...axis, size: 56 }], cursor: { show: true },
    }, data, node);
    plots[node.id].shape = shape;
  };

  const line = (label, index) => ({ label, stroke: colour(palette[index % palette.length]), width: 2, spanGaps: true });

  const show = (found) => {
    const throughput = document.getElementById("plot-throughput");
    if (found.throughput.at.length > 1 && found.throughput.tokens.some((each) => each > 0)) {
      draw(throughput, [{ label: "s" }, { ...line("tokens/s", 0), fill: colour("--accent") + "22" }],
        [found.throughput.at, found.throughput.tokens], { x: { time: false }, y: { range: (u, low, high) => [0, high || 1] } }, "seconds");
    } else empty(throughput, "Nothing generated yet.");

    const active = document.getElementById("plot-active");
    const at = [...new Set(found.active.flatMap((each) => each.at))].sort((a, b) => a - b);
    if (at.length > 1) {
      const rows = found.active.map((each) => {
        const known = new Map(each.at.map((when, place) => [when, each.active[place]]));
        return at.map((when) => (known.has(when) ? known.get(when) : null));
      });
      const most = Math.max(1, ...found.active.map((each) => each.slots || 1));
      draw(active, [{ label: "s" }, ...found.active.map((each, place) => line(each.worker, place))], [at, ...rows],
        { x: { time: false }, y: { range: [0, most] } }, "seconds");
    } else empty(active, "Workers are sampled every 5 seconds: the job is younger, or was shorter, than two samples.");

    const latency = document.getElementById("plot-latency");
    if (found.latency.count.length) {
      const bounds = found.latency.bound;
      draw(latency, [{ label: "s" }, { label: "answers", stroke: colour("--accent"), fill: colour("--accent") + "66",
        paths: uPlot.paths.bars({ size: [0.9, 60] }) }], [bounds.map((_, place) => place), found.latency.count],
        { x: { time: false, range: [-0.6, bounds.length - 0.4] }, y: { range: (u, low, high) => [0, high || 1] } }, "up to seconds");
      const plot = plots[latency.id];
      plot.bounds = bounds;
      plot.axes[0].values = (u, marks) => marks.map((mark) => (Number.isInteger(mark) && u.bounds[mark] !== undefined ? u.bounds[mark].toPrecision(2) : ""));
      plot.redraw(false, true);
    } else empty(latency, "No answer yet.");
  };

  const follow = async () => {
    const node = document.getElementById("plots");
    if (!node) return;
    try {
      const answer = await fetch(node.dataset.series, { headers: { "HX-Request": "true" } });
      if (answer.ok) show(await answer.json());
    } catch { /* the note below says so */ }
    const job = document.getElementById("job");
    if (job && job.dataset.final === "yes" && node.dataset.last) return;
    if (job && job.dataset.final === "yes") node.dataset.last = "yes";
    setTimeout(follow, 2000);
  };

  const dropping = () => {
    const zone = document.getElementById("drop"), input = document.getElementById("file");
    if (!zone) return;
    for (const name of ["dragenter", "dragover"]) zone.addEventListener(name, (e) => { e.preventDefault(); zone.classList.add("over"); });
    for (const name of ["dragleave", "drop"]) zone.addEventListener(name, () => zone.classList.remove("over"));
    zone.addEventListener("drop", async (e) => {
      e.preventDefault();
      const rest = new DataTransfer();
      for (const file of [...e.dataTransfer.files]) {
        if (/\.ya?ml$/i.test(file.name)) document.getElementById("task").value = await file.text();
        else rest.items.add(file);
      }
      if (rest.files.length) input.files = rest.files;
    });
  };

  const offline = (away) => { const note = document.getElementById("offline"); if (note) note.hidden = !away; };
  document.addEventListener("htmx:sendError", () => offline(true));
  document.addEventListener("htmx:afterOnLoad", () => offline(false));
  addEventListener("resize", () => { for (const id in plots) plots[id].setSize({ width: Math.max(240, document.getElementById(id).clientWidth), height: 200 }); });
  dropping();
  follow();
})();
