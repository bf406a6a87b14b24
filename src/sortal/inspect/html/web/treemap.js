// Bytes as areas, by module or by kind.
let mapTop = [];
let mapBy = "module";
const mapRoot = () => {
  const make = (label, node, kind) => ({
    label, node, kind, bytes: kind ? node.mix.get(kind) ?? 0 : node.bytes,
    get children() {
      if (isLeaf(node)) return [];
      return below(node).filter((n) => !n.alias && (kind ? n.mix.get(kind) : n.bytes))
        .map((n) => make(lastKey(n), n, kind));
    },
  });
  if (mapBy === "module") return make("all", root, null);
  return {
    label: "all", node: root, kind: null, bytes: root.bytes,
    children: [...root.mix].filter(([, bytes]) => bytes).map(([kind]) => make(kind.label, root, kind)),
  };
};

// Squarified rows: each row takes the cells that keep it closest to squares.
const squarify = (cells, x, y, w, h, place) => {
  const all = [...cells].sort((a, b) => b.bytes - a.bytes);
  let left = sum(all, (c) => c.bytes);
  let at = 0;
  while (at < all.length && w > 0 && h > 0 && left > 0) {
    const side = Math.min(w, h);
    const scale = (w * h) / left;
    let end = at, total = 0, best = Infinity;
    while (end < all.length) {
      const next = total + all[end].bytes;
      const depth = (next * scale) / side;
      const ends = [all[at].bytes, all[end].bytes].map((b) => (b * scale) / depth);
      const worst = Math.max(...ends.map((e) => Math.max(e / depth, depth / Math.max(e, 1e-9))));
      if (worst > best) break;
      best = worst;
      total = next;
      end++;
    }
    const depth = (total * scale) / side;
    let along = 0;
    for (const cell of all.slice(at, end)) {
      const length = (cell.bytes * scale) / depth;
      if (w >= h) place(cell, x, y + along, depth, length);
      else place(cell, x + along, y, length, depth);
      along += length;
    }
    if (w >= h) { x += depth; w -= depth; } else { y += depth; h -= depth; }
    left -= total;
    at = end;
  }
};

const mapCell = (cell, x, y, w, h, trail) => {
  const node = cell.node;
  const leaf = isLeaf(node) ? node.leaf : null;
  const kind = leaf?.kind ?? cell.kind ?? [...node.mix].sort((a, b) => b[1] - a[1])[0]?.[0];
  const text = `${sortal.show(node.path)}${leaf ? "" : `, ${leafCount(node.count)}`}, ${size(cell.bytes)}, ${share(cell.bytes, root.bytes)} of all bytes`;
  const g = svg("g", { role: "button", tabindex: "-1", "aria-label": `${cell.kind || leaf ? `${kind.label} ` : ""}${text}` },
    svg("title", {}, text), svg("rect", { x, y, width: Math.max(w, 0), height: Math.max(h, 0) }));
  if (kind) paint(g, kind);
  if (test !== null && !(leaf ? node.hits : node.hits > 0)) g.classList.add("left");
  g.addEventListener("click", (e) => { e.stopPropagation(); openCell(cell, trail); });
  g.open = () => openCell(cell, trail);
  return g;
};

const label = (g, text, x, y, w, h) => {
  const room = Math.floor((w - 10) / 7.3);
  if (room < 2 || h < 17) return;
  const short = text.length > room ? (room > 3 ? `${text.slice(0, room - 1)}…` : "") : text;
  if (short) g.append(svg("text", { x: x + 6, y: y + 14 }, short));
};

const chain = (cell) => {
  const inner = isLeaf(cell.node) || (cell.kind && cell.node === root) ? [] : cell.children;
  return inner.length === 1 && !isLeaf(inner[0].node) ? inner[0] : null;
};

const openCell = (cell, trail) => {
  if (isLeaf(cell.node)) { go(cell.node); return; }
  mapTop = trail;
  drawMap();
  $("map").querySelector("g")?.focus();
};

const drawMap = () => {
  const box = $("map");
  const w = box.clientWidth, h = box.clientHeight;
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}` });
  let here = mapRoot();
  const trails = [here];
  for (const step of mapTop) {
    const next = here.children.find((c) => c.label === step);
    if (!next) break;
    here = next;
    trails.push(here);
  }
  mapTop = trails.slice(1).map((c) => c.label);
  const draw = (cell, x, y, cw, ch, trail, depth) => {
    if (cw * ch < 6) return;
    // Modules that hold one module alone share a frame.
    for (let inner = chain(cell); inner; inner = chain(cell)) {
      cell = { ...inner, label: `${cell.label}.${inner.label}`, step: inner.label, children: inner.children };
      trail = [...trail, cell.step];
    }
    const g = mapCell(cell, x, y, cw, ch, trail);
    picture.append(g);
    const inner = !isLeaf(cell.node) && cw > 46 && ch > 40 && depth < 6 ? cell.children : [];
    label(g, cell.label, x, y, cw, ch);
    if (!inner.length) {
      const bytes = size(cell.bytes);
      if (ch > 36 && bytes.length * 7.3 < cw - 10) label(g, bytes, x, y + 16, cw, ch - 16);
      return;
    }
    g.classList.add("group");
    squarify(inner, x + 3, y + 19, cw - 6, ch - 22, (c, ...at) => draw(c, ...at, [...trail, c.label], depth + 1));
  };
  const cells = isLeaf(here.node) ? [here] : here.children;
  squarify(cells, 0, 0, w, h, (c, ...at) => draw(c, ...at, [...mapTop, c.label], 0));
  box.replaceChildren(root.bytes ? picture : el("p", { class: "empty" }, "There are no bytes to divide."));
  picture.querySelector("g")?.setAttribute("tabindex", "0");
  $("crumbs").replaceChildren(...trails.map((c, i) => (i === trails.length - 1
    ? el("span", { "aria-current": "location" }, `${c.label}, ${size(c.bytes)}`)
    : el("button", { type: "button", onclick: () => { mapTop = mapTop.slice(0, i); drawMap(); } }, `${c.label} /`))));
};

$("map").addEventListener("keydown", (e) => {
  const cells = [...$("map").querySelectorAll("g")];
  const at = cells.indexOf(document.activeElement);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
  if (step) cells[Math.max(0, Math.min(cells.length - 1, at + step))]?.focus();
  else if (e.key === "Home") cells[0]?.focus();
  else if (e.key === "End") cells.at(-1)?.focus();
  else if ((e.key === "Enter" || e.key === " ") && at >= 0) cells[at].open();
  else if (e.key === "Escape" && mapTop.length) {
    mapTop = mapTop.slice(0, -1);
    drawMap();
    $("map").querySelector("g")?.focus();
  } else return;
  e.preventDefault();
});
$("map").addEventListener("focusin", (e) => {
  $("map").querySelectorAll("g[tabindex='0']").forEach((g) => g.setAttribute("tabindex", "-1"));
  e.target.closest("g")?.setAttribute("tabindex", "0");
});
for (const by of ["module", "kind"]) {
  $(`by-${by}`).addEventListener("click", () => {
    mapBy = by;
    mapTop = [];
    for (const x of ["module", "kind"]) $(`by-${x}`).setAttribute("aria-pressed", String(x === by));
    drawMap();
  });
}
new ResizeObserver(() => { if (!$("panel-map").hidden) drawMap(); }).observe($("map"));
