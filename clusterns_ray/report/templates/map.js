"use strict";
// Draws the map of a corpus: points into an image, pixel by pixel, which keeps tens of thousands of them fluent, and
// over it names and lines. The list beside it shows clusters, sentences and what is searched for.
(async () => {
  const byId = (id) => document.getElementById(`map-${id}`);
  const [canvas, tip, side, search, status] = ["canvas", "tip", "side", "search", "status"].map(byId);
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const LISTED = 100;

  let map;
  try {
    if (typeof DecompressionStream === "undefined") throw new Error("no DecompressionStream");
    const bytes = Uint8Array.from(atob(byId("data").textContent), (sign) => sign.charCodeAt(0));
    map = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  } catch (error) {
    byId("notice").textContent =
      `The map cannot be drawn in this browser (${error.message}). Chrome 111, Firefox 113, Safari 16.4 and newer ones can.`;
    byId("notice").hidden = false;
    document.documentElement.dataset.mapped = "failed";
    return;
  }
  const { texts, clusters, panes, grid } = map;
  const cluster = Uint16Array.from(map.cluster);
  const n = texts.length;
  const lower = texts.map((text) => text.toLowerCase());
  const name = (c) => clusters[c].terms.slice(0, 3).join(", ") || `cluster ${clusters[c].id}`;
  const members = clusters.map(() => []);
  cluster.forEach((c, i) => members[c].push(i));
  members.forEach((list) => list.sort((a, b) => map.cosine[b] - map.cosine[a] || a - b));
  const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  for (const pane of panes) {
    pane.xy = Float32Array.from(pane.xy, (value) => value / grid);
    pane.at = members.map((list) => [0, 1].map((axis) => middle(list.map((i) => pane.xy[2 * i + axis]))));
  }

  // What is chosen: a sentence, a cluster or words; nothing is null. `lit` are the points that stand out.
  const chosen = { point: null, cluster: null, words: "" };
  let lit = null;
  let hover = null;
  const view = { zoom: 1, x: 0.5, y: 0.5 };

  // ---- colours ----------------------------------------------------------------------------------------------

  const context = canvas.getContext("2d", { willReadFrequently: true });
  let ink, colors, faint, theme;
  const packed = (css) => {
    const brush = new OffscreenCanvas(1, 1).getContext("2d");
    brush.fillStyle = css;
    brush.fillRect(0, 0, 1, 1);
    return new Uint32Array(brush.getImageData(0, 0, 1, 1).data.buffer)[0];
  };
  // Hues by the golden angle: clusters that follow one another in size look different.
  const css = (c, dark) => `oklch(${(dark ? [0.74, 0.82, 0.66] : [0.56, 0.47, 0.64])[c % 3]} 0.15 ${(c * 137.508 + 250) % 360})`;
  const variable = (key) => getComputedStyle(document.documentElement).getPropertyValue(`--${key}`).trim();
  const repaint = () => {
    theme = scheme.matches && !paper.matches ? "dark" : "light";
    ink = Object.fromEntries(["paper", "ink", "muted", "rule", "orange", "blue"].map((key) => [key, variable(key)]));
    colors = Uint32Array.from(clusters, (_, c) => packed(css(c, theme === "dark")));
    faint = packed(ink.rule);
    document.querySelectorAll(".map-swatch").forEach((swatch) => {
      swatch.style.background = css(+swatch.dataset.cluster, theme === "dark");
    });
    draw();
  };

  // ---- drawing ----------------------------------------------------------------------------------------------

  let image, pixels, ratio;
  const resize = () => {
    ratio = Math.min(devicePixelRatio || 1, 2);
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((length) => Math.max(1, Math.round(length * ratio)));
    canvas.width = width;
    canvas.height = height;
    image = context.createImageData(width, height);
    pixels = new Uint32Array(image.data.buffer);
    const below = panes.length > 1 && width < height;
    panes.forEach((pane, at) => {
      pane.width = below || panes.length === 1 ? width : width >> 1;
      pane.height = below ? height >> 1 : height;
      pane.left = below ? 0 : at * pane.width;
      pane.top = below ? at * pane.height : 0;
    });
    draw();
  };
  const extent = (pane) => Math.min(pane.width, pane.height) * 0.92 * view.zoom;
  const screen = (pane, x, y) => {
    const scale = extent(pane);
    return [pane.left + pane.width / 2 + (x - view.x) * scale, pane.top + pane.height / 2 + (y - view.y) * scale];
  };
  const place = (pane, i) => screen(pane, pane.xy[2 * i], pane.xy[2 * i + 1]);
  const inside = (pane, x, y, edge = 0) =>
    x >= pane.left + edge && y >= pane.top + edge && x < pane.left + pane.width - edge && y < pane.top + pane.height - edge;

  // A disc as offsets and opacities (0 to 256) of its pixels.
  const discs = new Map();
  const disc = (radius) => {
    const key = `${radius} ${canvas.width}`;
    if (!discs.has(key)) {
      const reach = Math.ceil(radius);
      const offsets = [], covers = [];
      for (let y = -reach; y <= reach; y++) {
        for (let x = -reach; x <= reach; x++) {
          const cover = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(x, y)));
          if (cover > 0) offsets.push(y * canvas.width + x), covers.push(Math.round(256 * cover));
        }
      }
      discs.set(key, { reach, offsets: Int32Array.from(offsets), covers: Uint16Array.from(covers) });
    }
    return discs.get(key);
  };
  // Stamps the points that are `wanted` (1 or 0 in `lit`; all if that is null) into a pane.
  const stamp = (pane, wanted, colorOf, { reach, offsets, covers }) => {
    const { xy } = pane, scale = extent(pane), width = canvas.width, count = offsets.length;
    const [left, top] = screen(pane, 0, 0);
    const [low, high] = [pane.left + reach, pane.left + pane.width - reach];
    const [upper, lowest] = [pane.top + reach, pane.top + pane.height - reach];
    for (let i = 0; i < n; i++) {
      if (lit && lit[i] !== wanted) continue;
      const x = Math.round(left + xy[2 * i] * scale), y = Math.round(top + xy[2 * i + 1] * scale);
      if (x < low || x >= high || y < upper || y >= lowest) continue;
      const at = y * width + x, color = colorOf ? colorOf[cluster[i]] : faint;
      for (let k = 0; k < count; k++) {
        const cover = covers[k], spot = at + offsets[k];
        if (cover === 256) {
          pixels[spot] = color;
          continue;
        }
        const below = pixels[spot], rest = 256 - cover;
        const red = ((color & 255) * cover + (below & 255) * rest) >> 8;
        const green = (((color >> 8) & 255) * cover + ((below >> 8) & 255) * rest) >> 8;
        const blue = (((color >> 16) & 255) * cover + ((below >> 16) & 255) * rest) >> 8;
        pixels[spot] = 0xff000000 | (blue << 16) | (green << 8) | red;
      }
    }
  };

  let waiting = false;
  const draw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      paint();
    });
  };
  const paint = () => {
    pixels.fill(packedPaper());
    const radius = ratio * Math.min(5, Math.max(1, 110 / Math.sqrt(n)) * Math.sqrt(view.zoom));
    const [small, large] = [disc(Math.round(2 * radius) / 2), disc(Math.round(2 * radius) / 2 + ratio / 2)];
    for (const pane of panes) {
      stamp(pane, 0, lit ? null : colors, small);
      if (lit) stamp(pane, 1, colors, large);
    }
    context.putImageData(image, 0, 0);
    context.save();
    context.scale(ratio, ratio);
    for (const pane of panes) {
      context.save();
      context.beginPath();
      context.rect(pane.left / ratio, pane.top / ratio, pane.width / ratio, pane.height / ratio);
      context.clip();
      relations(pane);
      names(pane);
      context.restore();
      frame(pane);
    }
    marks();
    context.restore();
    document.documentElement.dataset.mapped = theme;
  };
  let paperColor = [null, 0];
  const packedPaper = () => {
    if (paperColor[0] !== ink.paper) paperColor = [ink.paper, packed(ink.paper)];
    return paperColor[1];
  };

  const line = (from, to, color, width, dash = []) => {
    context.beginPath();
    context.setLineDash(dash);
    context.strokeStyle = color;
    context.lineWidth = width;
    context.moveTo(...from.map((value) => value / ratio));
    context.lineTo(...to.map((value) => value / ratio));
    context.stroke();
    context.setLineDash([]);
  };
  const ring = ([x, y], color, radius) => {
    context.beginPath();
    context.arc(x / ratio, y / ratio, radius, 0, 7);
    context.strokeStyle = color;
    context.lineWidth = 2;
    context.stroke();
  };
  // False negatives of the chosen sentence by whole lines, hard negatives by broken ones.
  const relations = (pane) => {
    const i = chosen.point;
    if (i === null) return;
    const from = place(pane, i);
    for (const other of map.similar[i]) line(from, place(pane, other), ink.blue, 1.5);
    for (const other of hardSentences(i)) line(from, place(pane, other), ink.orange, 1.5, [5, 4]);
    if (!map.hard && map.second[i] >= 0) {
      const to = screen(pane, ...pane.at[map.second[i]]);
      line(from, to, ink.orange, 2, [5, 4]);
      ring(to, ink.orange, 7);
    }
  };
  const hardSentences = (i) => (map.hard ? map.hard[i] : []);

  // Names of clusters, the largest first, where no other name stands.
  const names = (pane) => {
    context.font = "600 12px ui-sans-serif, system-ui, sans-serif";
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    const taken = [];
    const only = chosen.cluster ?? (chosen.point === null ? null : cluster[chosen.point]);
    const first = [only, chosen.point === null || map.hard ? null : map.second[chosen.point]];
    const order = lit ? first.filter((c) => c !== null && c >= 0) : clusters.map((_, c) => c);
    for (const c of order) {
      const [x, y] = screen(pane, ...pane.at[c]).map((value) => value / ratio);
      if (!inside(pane, x * ratio, y * ratio)) continue;
      const text = name(c);
      const half = context.measureText(text).width / 2 + 4;
      const left = pane.left / ratio + half, right = (pane.left + pane.width) / ratio - half;
      const at = left < right ? Math.min(Math.max(x, left), right) : x;
      const box = [at - half, y - 9, at + half, y + 9];
      if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
      taken.push(box);
      context.strokeStyle = ink.paper;
      context.lineWidth = 4;
      context.strokeText(text, at, y);
      context.fillStyle = ink.ink;
      context.fillText(text, at, y);
    }
  };
  const frame = (pane) => {
    if (panes.length === 1) return;
    context.strokeStyle = ink.rule;
    context.lineWidth = 1;
    context.strokeRect(pane.left / ratio, pane.top / ratio, pane.width / ratio, pane.height / ratio);
    context.font = "600 13px ui-sans-serif, system-ui, sans-serif";
    context.textAlign = "left";
    context.textBaseline = "top";
    context.strokeStyle = ink.paper;
    context.lineWidth = 4;
    context.strokeText(pane.name, pane.left / ratio + 10, pane.top / ratio + 10);
    context.fillStyle = ink.muted;
    context.fillText(pane.name, pane.left / ratio + 10, pane.top / ratio + 10);
  };
  // The sentence that is pointed at or chosen, in both panes, and a line from where it was to where it is.
  const marks = () => {
    for (const i of new Set([chosen.point, hover])) {
      if (i === null) continue;
      const spots = panes.map((pane) => place(pane, i));
      const seen = panes.map((pane, at) => inside(pane, ...spots[at]));
      if (panes.length > 1 && seen[0] && seen[1]) line(spots[0], spots[1], ink.muted, 1.5, [2, 3]);
      spots.forEach((spot, at) => seen[at] && ring(spot, ink.ink, 6));
    }
  };

  // ---- the list ---------------------------------------------------------------------------------------------

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const swatch = (c) => {
    const made = element("span", { className: "map-swatch" });
    made.dataset.cluster = c;
    made.style.background = css(c, theme === "dark");
    return made;
  };
  const button = (c, text, note, choose) =>
    element("li", {}, element("button", { type: "button", onclick: choose }, swatch(c), element("span", {}, text), element("span", {}, note)));
  const clusterButton = (c) => button(c, name(c), clusters[c].size.toLocaleString("en"), () => choose({ cluster: c }));
  const pointButton = (i, note = "") => button(cluster[i], texts[i], note, () => choose({ point: i }));
  const listing = (points, note = () => "") => {
    const list = element("ol");
    const more = element("button", { type: "button" });
    const grow = () => {
      const from = list.children.length;
      list.append(...points.slice(from, from + LISTED).map((i, at) => pointButton(i, note(i, from + at))));
      more.textContent = `Show more of ${points.length.toLocaleString("en")}`;
      more.hidden = list.children.length >= points.length;
    };
    more.onclick = grow;
    grow();
    return [list, more];
  };
  const sentences = (count) => `${count.toLocaleString("en")} ${count === 1 ? "sentence" : "sentences"}`;
  const back = () => element("button", { type: "button", onclick: () => choose({}) }, "All clusters");

  const showList = (found) => {
    const parts = [];
    let summary = `${sentences(n)} in ${clusters.length} clusters`;
    if (chosen.point !== null) {
      const i = chosen.point, c = cluster[i];
      summary = `one sentence, of ${name(c)}`;
      parts.push(back(), element("h3", {}, "Sentence"), element("p", {}, texts[i]));
      parts.push(element("small", {}, `cosine to its centroid ${(map.cosine[i] / 1000).toFixed(2)}`));
      parts.push(element("ol", {}, clusterButton(c)));
      const limit = map.falseNegativeCosine === null ? "" : `, with a cosine above ${map.falseNegativeCosine}`;
      const near = map.similar[i];
      parts.push(element("h3", {}, "False negatives"));
      parts.push(element("p", {}, near.length
        ? `Training would take every sentence of its cluster in the same batch${limit} as one. The most similar:`
        : `There is none: no other sentence here is of its cluster${limit}.`));
      parts.push(...listing(near, (_, at) => (map.similarCosine[i][at] / 100).toFixed(2)));
      parts.push(element("h3", {}, "Hard negatives"));
      if (map.hard) {
        parts.push(element("p", {}, "Sentences drawn from its second nearest cluster:"), ...listing(map.hard[i]));
      } else if (map.second[i] >= 0) {
        parts.push(element("p", {}, "The centroid of its second nearest cluster:"), element("ol", {}, clusterButton(map.second[i])));
      } else {
        parts.push(element("p", {}, "The centroid of its second nearest cluster, which holds no sentence here."));
      }
    } else if (chosen.cluster !== null) {
      const c = chosen.cluster;
      summary = `${name(c)}: ${sentences(clusters[c].size)}`;
      parts.push(back(), element("h3", {}, swatch(c), ` ${name(c)}`));
      parts.push(element("p", {}, `${sentences(clusters[c].size)}; mean cosine to the centroid ${clusters[c].tightness.toFixed(2)}. Terms: ${clusters[c].terms.join(", ") || "none"}.`));
      parts.push(element("h3", {}, "Sentences, the most typical first"), ...listing(members[c], (i) => (map.cosine[i] / 1000).toFixed(2)));
    } else if (chosen.words) {
      summary = `${sentences(found.length)} with “${chosen.words}”`;
      parts.push(back(), element("h3", {}, summary), ...listing(found));
    } else {
      parts.push(element("h3", {}, `${clusters.length} clusters, the largest first`), element("ol", {}, ...clusters.map((_, c) => clusterButton(c))));
    }
    status.textContent = summary;
    side.replaceChildren(...parts);
    side.scrollTop = 0;
  };

  const choose = ({ point = null, cluster: picked = null, words = "" }) => {
    const typing = document.activeElement === search;
    const within = side.contains(document.activeElement);
    Object.assign(chosen, { point, cluster: picked, words });
    if (!words && !typing) search.value = "";
    let found = null;
    if (point !== null) found = [point, ...map.similar[point], ...hardSentences(point)];
    else if (picked !== null) found = members[picked];
    else if (words) {
      const wanted = words.toLowerCase();
      found = [...lower.keys()].filter((i) => lower[i].includes(wanted));
    }
    lit = null;
    if (found) {
      lit = new Uint8Array(n);
      for (const i of found) lit[i] = 1;
    }
    showList(found);
    if (within) (side.querySelector("button") ?? side).focus();
    draw();
  };

  // ---- pointer, wheel and keys ------------------------------------------------------------------------------

  const spotOf = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left - canvas.clientLeft) * ratio, (event.clientY - box.top - canvas.clientTop) * ratio];
  };
  const paneAt = (x, y) => panes.find((pane) => inside(pane, x, y)) ?? panes[panes.length - 1];
  const nearest = (x, y) => {
    const pane = paneAt(x, y), scale = extent(pane);
    const [left, top] = screen(pane, 0, 0);
    let best = (12 * ratio) ** 2, at = null;
    for (let i = 0; i < n; i++) {
      const dx = left + pane.xy[2 * i] * scale - x, dy = top + pane.xy[2 * i + 1] * scale - y;
      const distance = (dx * dx + dy * dy) * (lit && !lit[i] ? 4 : 1);
      if (distance < best) [best, at] = [distance, i];
    }
    return at;
  };
  const zoom = (factor, x, y) => {
    const pane = x === undefined ? panes[0] : paneAt(x, y);
    const before = extent(pane);
    view.zoom = Math.min(60, Math.max(1, view.zoom * factor));
    if (x !== undefined) {
      const change = 1 / before - 1 / extent(pane);
      move((x - pane.left - pane.width / 2) * change, (y - pane.top - pane.height / 2) * change);
    } else move(0, 0);
  };
  const move = (dx, dy) => {
    const room = 0.5 - 0.4 / view.zoom;
    view.x = Math.min(0.5 + room, Math.max(0.5 - room, view.x + dx));
    view.y = Math.min(0.5 + room, Math.max(0.5 - room, view.y + dy));
    point(null);
    draw();
  };
  const whole = () => {
    Object.assign(view, { zoom: 1, x: 0.5, y: 0.5 });
    draw();
  };
  const point = (i, x, y) => {
    if (i === hover && i === null) return;
    hover = i;
    tip.hidden = i === null;
    if (i !== null) {
      tip.replaceChildren(texts[i], element("small", {}, name(cluster[i])));
      const left = Math.min(x / ratio + 14, canvas.clientWidth - tip.offsetWidth - 4);
      const above = y / ratio + 18 + tip.offsetHeight > canvas.clientHeight;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${above ? y / ratio - tip.offsetHeight - 12 : y / ratio + 18}px`;
    }
    draw();
  };

  const fingers = new Map();
  let travelled = 0;
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, spotOf(event));
    if (fingers.size === 1) travelled = 0;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spotOf(event);
    const last = fingers.get(event.pointerId);
    if (!last) return point(nearest(x, y), x, y);
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, spot]) => spot);
    travelled += Math.hypot(x - last[0], y - last[1]);
    if (others.length) {
      const [fx, fy] = others[0];
      zoom(Math.hypot(x - fx, y - fy) / Math.max(1, Math.hypot(last[0] - fx, last[1] - fy)), (x + fx) / 2, (y + fy) / 2);
    }
    if (travelled > 4 * ratio) {
      const scale = extent(paneAt(x, y)) * (1 + others.length);
      move((last[0] - x) / scale, (last[1] - y) / scale);
    }
    fingers.set(event.pointerId, [x, y]);
  });
  const lift = (event) => {
    if (event.type === "pointerup" && fingers.size === 1 && travelled <= 4 * ratio) {
      const spot = spotOf(event), i = nearest(...spot);
      choose(i === null ? {} : { point: i });
      point(i, ...spot);
    }
    fingers.delete(event.pointerId);
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => point(null));
  canvas.addEventListener("dblclick", (event) => zoom(2, ...spotOf(event)));
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), ...spotOf(event));
  }, { passive: false });
  const step = 0.1;
  const keys = {
    "ArrowLeft": () => move(-step / view.zoom, 0),
    "ArrowRight": () => move(step / view.zoom, 0),
    "ArrowUp": () => move(0, -step / view.zoom),
    "ArrowDown": () => move(0, step / view.zoom),
    "+": () => zoom(1.4),
    "=": () => zoom(1.4),
    "-": () => zoom(1 / 1.4),
    "0": whole,
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.getElementById("map").addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose({});
  });
  search.addEventListener("input", () => choose({ words: search.value.trim() }));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") side.querySelector("li button")?.click();
  });
  byId("in").onclick = () => zoom(1.4);
  byId("out").onclick = () => zoom(1 / 1.4);
  byId("whole").onclick = whole;

  scheme.addEventListener("change", repaint);
  paper.addEventListener("change", repaint);
  new ResizeObserver(resize).observe(canvas);
  resize();
  repaint();
  choose({});
})();
