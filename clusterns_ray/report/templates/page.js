"use strict";
// Unpacks plotly.js, draws every plot in the colours of the reader's theme, and again when that changes. On paper the
// plots are those of the light theme, as the page is.
(async () => {
  const plots = [...document.querySelectorAll(".plot")].map((box) => [box, JSON.parse(box.nextElementSibling.textContent)]);
  const dark = new Map(Object.values(JSON.parse(document.getElementById("colors").textContent)));
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const touch = matchMedia("(pointer: coarse)");

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)).join(", ");
  const tints = new Map([...dark].map(([from, to]) => [channels(from), channels(to)]));
  const repaint = (value) => {
    if (typeof value === "string") {
      if (dark.has(value)) return dark.get(value);
      const tint = /^rgba\((\d+, \d+, \d+), ([\d.]+)\)$/.exec(value);
      return tint && tints.has(tint[1]) ? `rgba(${tints.get(tint[1])}, ${tint[2]})` : value;
    }
    if (Array.isArray(value)) return value.map(repaint);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, repaint(item)]));
    }
    return value;
  };

  const unpack = async () => {
    if (typeof DecompressionStream === "undefined") throw new Error("no DecompressionStream");
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = Uint8Array.from(packed, (sign) => sign.charCodeAt(0));
    const source = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(source).text();
    document.head.append(script);
    if (typeof Plotly === "undefined") throw new Error("plotly.js did not start");
  };

  const nextFrame = () => new Promise((done) => setTimeout(done, 0));
  let printing = false;
  const isDark = () => scheme.matches && !paper.matches && !printing;
  const draw = (box, plot, dark) => {
    const { data, layout } = structuredClone(dark ? repaint(plot) : plot);
    // A finger scrolls the page; a mouse zooms into the plot.
    if (touch.matches) layout.dragmode = false;
    return Plotly.react(box, data, layout, { responsive: true, displayModeBar: false, showTips: false });
  };
  const drawAll = async () => {
    const dark = isDark();
    for (const [box, plot] of plots) {
      await draw(box, plot, dark);
      await nextFrame();
    }
    document.documentElement.dataset.drawn = dark ? "dark" : "light";
  };

  try {
    await unpack();
  } catch (error) {
    const notice = document.getElementById("notice");
    notice.textContent =
      `The plots cannot be drawn in this browser (${error.message}). Chrome 80, Firefox 113, Safari 16.4 and newer ` +
      "ones can. The words and tables are all there.";
    notice.hidden = false;
    document.documentElement.dataset.drawn = "failed";
    return;
  }
  let drawing = drawAll();
  const again = () => {
    drawing = drawing.then(drawAll);
  };
  scheme.addEventListener("change", again);
  paper.addEventListener("change", again);
  addEventListener("beforeprint", () => {
    printing = true;
    // At once: the browser prints as soon as this returns.
    if (scheme.matches) plots.forEach(([box, plot]) => draw(box, plot, false));
  });
  addEventListener("afterprint", () => {
    printing = false;
    again();
  });
})();
