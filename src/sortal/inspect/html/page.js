// The page: a tree of leaves by path, a filter, details, a treemap, and changes. All
// text is set as text, never as HTML, because names in a file are anybody's.
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const leaves = sortal.leaves(data);
const read = sortal.filters(data);
const $ = (id) => document.getElementById(id);

// ------------------------------------------------------------------------ elements
const el = (tag, props = {}, ...children) => {
  const made = document.createElement(tag);
  return fill(made, props, children);
};
const svg = (tag, props = {}, ...children) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(made, props, children);
};
const fill = (made, props, children) => {
  for (const [name, x] of Object.entries(props)) {
    if (name === "onclick") made.addEventListener("click", x);
    else if (name === "kind") paint(made, x);
    else if (x !== null && x !== undefined && x !== false) made.setAttribute(name, x);
  }
  made.append(...children.filter((x) => x !== null));
  return made;
};

// ------------------------------------------------------------------------- numbers
const plural = (n, one, many) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
const leafCount = (n) => plural(n, "leaf", "leaves");
const size = (n) => {
  if (n < 1000) return `${n} B`;
  let x = n;
  for (const unit of "kMGTPE") {
    x /= 1000;
    if (x < 999.95 || unit === "E") return `${x.toFixed(1)} ${unit}B`;
  }
  return "";
};
const big = (n) => {
  if (n < 100000) return n.toLocaleString("en-US");
  for (const [unit, at] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (n >= at) return `${(n / at).toFixed(1)} ${unit}`;
  }
  return String(n);
};
const number = (x) => {
  if (typeof x === "string") return x === "inf" ? "infinite or NaN" : x;
  if (Number.isInteger(x) && Math.abs(x) < 1e7) return x.toLocaleString("en-US");
  const short = Math.abs(x) >= 1e-3 && Math.abs(x) < 1e6 ? x.toPrecision(5) : x.toExponential(3);
  return short.includes("e") ? short : String(Number(short));
};
const share = (n, all) => {
  const x = (100 * n) / Math.max(all, 1);
  if (n === 0) return "0%";
  return x < 0.01 ? "<0.01%" : `${Number(x.toPrecision(3))}%`;
};
const sum = (rows, of) => rows.reduce((total, row) => total + of(row), 0);

// --------------------------------------------------------------------------- kinds
const HUES = {
  Param: 262, BatchStat: 50, OptVariable: 150, OptState: 178, OptArray: 122, Cache: 218,
  RngKey: 310, RngCount: 345, RngState: 328, Intermediate: 75, Perturbation: 20,
  LoRAParam: 286, Variable: 98,
};
data.kinds.forEach((kind) => {
  kind.leaves = leaves.filter((x) => x.kind === kind);
  kind.bytes = sum(kind.leaves, (x) => x.bytes);
});
// A built-in kind has its own hue; another one that is far from those already there.
const taken = [];
const choose = (kind, hue) => { kind.hue = hue; taken.push(hue); };
const apart = (hue) => Math.min(...taken.map((t) => Math.min(Math.abs(t - hue), 360 - Math.abs(t - hue))), 360);
const named = data.kinds.filter((k) => k.name !== null);
for (const kind of named) {
  const base = kind.name.split(".").at(-1);
  const own = /^(sortal|flax\.nnx(\.\w+)*|sortal\.nn\.lora)\.\w+$/.test(kind.name);
  if (own && base in HUES && !taken.includes(HUES[base])) choose(kind, HUES[base]);
}
const circle = [...Array(72).keys()].map((n) => (n * 5 + 195) % 360);
for (const kind of named.filter((k) => k.hue === undefined)) {
  choose(kind, circle.reduce((a, b) => (apart(b) > apart(a) ? b : a)));
}
const paint = (made, kind) => {
  made.classList.add("kind");
  made.classList.toggle("raw", kind.name === null);
  made.style.setProperty("--hue", String(kind.hue ?? 0));
};
const kindFilter = (kind) => (kind.name === null ? "Not(Variable)" : kind.label);

// ---------------------------------------------------------------------------- tree
// A node has children or one leaf; `alias` marks a second path of a leaf.
const facts = new Map();
const nodeAt = (path) => path.map((k) => k.id).join(".");
const keys = sortal.keys(data);
for (const [path, cls, statics] of data.nodes) {
  const rows = statics.map(([key, text]) => [key, data.texts[text]]);
  facts.set(nodeAt(path.map((n) => keys[n])), { cls: data.texts[cls], statics: rows });
}
const makeNode = (path, up) => ({
  path, up, children: new Map(), leaf: null, alias: false, open: false,
  bytes: 0, count: 0, hits: 0, level: path.length, mix: new Map(),
});
const root = makeNode([], null);
const grow = (path, leaf, alias) => {
  let node = root;
  path.forEach((key, i) => {
    let below = node.children.get(key.id);
    if (!below) node.children.set(key.id, below = makeNode(path.slice(0, i + 1), node));
    node = below;
  });
  node.leaf = leaf;
  node.alias = alias;
  return node;
};
const rowsOf = leaves.map((leaf) => [grow(leaf.path, leaf, false)]);
leaves.forEach((leaf, i) => {
  for (const path of leaf.aliases) rowsOf[i].push(grow(path, leaf, true));
});
leaves.forEach((leaf, i) => {
  for (let node = rowsOf[i][0]; node; node = node.up) {
    node.bytes += leaf.bytes;
    node.count += 1;
    node.mix.set(leaf.kind, (node.mix.get(leaf.kind) ?? 0) + leaf.bytes);
  }
});
// In the order of the library: integers, then texts, each by size.
const rank = (a, b) => {
  const [x, y] = [a, b].map((node) => node.path.at(-1));
  if (x.t !== y.t) return (x.t ? (x.t === "str" ? 1 : 2) : 0) - (y.t ? (y.t === "str" ? 1 : 2) : 0);
  if (!x.t) return x.n - y.n;
  return x.s < y.s ? -1 : 1;
};
const sort = (node) => {
  if (!node.children.size) return;
  const entries = [...node.children].sort(([, a], [, b]) => rank(a, b));
  node.children = new Map(entries);
  entries.forEach(([, child]) => sort(child));
};
sort(root);
const below = (node) => [...node.children.values()];
const isLeaf = (node) => node.leaf !== null && node.children.size === 0;
const factsOf = (node) => facts.get(nodeAt(node.path));
root.open = true;
// As much is unfolded at first as fits a screen.
for (let shown = root.children.size, level = [root]; level.length;) {
  level = level.flatMap(below).filter((n) => !isLeaf(n));
  shown += sum(level, (n) => n.children.size);
  if (shown > 40) break;
  level.forEach((n) => { n.open = true; });
}

let test = null;
let active = root;
let visible = [];
const matches = (leaf) => test !== null && test(leaf);

const list = () => {
  visible = [];
  const only = test !== null && $("only").checked;
  const walk = (node) => {
    const rows = below(node).filter((n) => !only || n.hits);
    rows.forEach((n, i) => {
      n.place = i + 1;
      n.places = rows.length;
      visible.push(n);
      if (n.open) walk(n);
    });
  };
  if (leaves.length === 1 && leaves[0].path.length === 0) visible = [root];
  walk(root);
};

const rowHeight = () => parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--row"));
const tree = $("tree");
const rows = $("rows");
const hasSpecs = leaves.some((x) => x.spec);
document.body.classList.toggle("specs", hasSpecs);
const heads = ["path", "kind", "dtype and shape", "bytes>", ...(hasSpecs ? ["spec", "on a device>"] : [])];
$("heads").append(...heads.map((h) => el("span", { class: h.endsWith(">") ? "number" : null }, h.replace(">", ""))));

const drawTree = () => {
  $("heads").style.paddingRight = `${tree.offsetWidth - tree.clientWidth + 12}px`;
  const height = rowHeight();
  const first = Math.max(0, Math.floor(tree.scrollTop / height) - 8);
  const last = Math.min(visible.length, Math.ceil((tree.scrollTop + tree.clientHeight) / height) + 8);
  rows.style.height = `${visible.length * height}px`;
  const drawn = [];
  for (let i = first; i < last; i++) drawn.push(drawRow(visible[i], i, height));
  const at = visible.indexOf(active);
  if (at >= 0 && (at < first || at >= last)) drawn.push(drawRow(active, at, height));
  if (!visible.length) drawn.push(el("div", { class: "empty" }, "Nothing to show."));
  rows.replaceChildren(...drawn);
  if (at >= 0) tree.setAttribute("aria-activedescendant", `row-${at}`);
  else tree.removeAttribute("aria-activedescendant");
};

const drawRow = (node, i, height) => {
  const leaf = isLeaf(node) ? node.leaf : null;
  const row = el("div", {
    role: "treeitem", id: `row-${i}`, class: `row ${leaf ? "leaf" : "module"}`,
    "aria-level": Math.max(node.level, 1), "aria-posinset": node.place ?? 1,
    "aria-setsize": node.places ?? 1, "aria-selected": String(node === active),
    "aria-expanded": leaf ? null : String(node.open),
  });
  row.style.top = `${i * height}px`;
  row.style.setProperty("--level", String(Math.max(node.level - 1, 0)));
  row.classList.toggle("active", node === active);
  if (test !== null) row.classList.add(node.hits ? "hit" : "left");
  if (test !== null && leaf && node.hits) row.classList.add("taken");
  row.append(...(leaf ? leafCells(node, leaf) : moduleCells(node)));
  row.addEventListener("click", (e) => {
    detail.classList.add("asked");
    const again = node === active;
    select(node);
    if (!leaf && (again || e.target.closest(".arrow, .text"))) toggle(node);
  });
  return row;
};

const lastKey = (node) => {
  const key = node.path.at(-1);
  if (!key) return "<root>";
  return key.plain ? key.s : `[${key.r}]`;
};

const leafCells = (node, leaf) => [
  el("span", { class: "name" },
    el("span", { class: "arrow" }),
    el("span", { class: "text", title: sortal.show(node.path) }, lastKey(node)),
    ...badges(node, leaf)),
  el("span", { class: "what chip", kind: leaf.kind, title: leaf.kind.name ?? leaf.kind.label }, leaf.kind.label),
  el("span", { class: "value", title: leaf.text }, leaf.text),
  el("span", { class: "number" }, node.alias ? "–" : size(leaf.bytes)),
  ...(hasSpecs ? [
    el("span", { class: "value spec", title: leaf.spec }, leaf.spec),
    el("span", { class: "number device" }, node.alias ? "–" : size(leaf.device)),
  ] : []),
];

const badges = (node, leaf) => {
  const found = [];
  const facts = data.numbers[leaf.number];
  if (Array.isArray(facts) && facts[5]) found.push(el("span", { class: "badge bad" }, `${big(facts[5])} NaN`));
  if (Array.isArray(facts) && facts[6]) found.push(el("span", { class: "badge bad" }, `${big(facts[6])} inf`));
  const what = node.alias ? null : changesAt.get(leaf.number);
  if (what) found.push(el("span", { class: "badge new" }, what.map((c) => (c.what === "values" ? "changed" : c.what)).join(", ")));
  if (leaf.aliases.length) {
    const other = rowsOf[leaf.number][node.alias ? 0 : 1];
    const button = el("button", {
      type: "button", class: "badge tie", tabindex: "-1", title: `Go to ${sortal.show(other.path)}`,
      onclick: (e) => { e.stopPropagation(); go(other); },
    }, node.alias ? "= tied" : `tied × ${leaf.aliases.length + 1}`);
    found.push(button);
  }
  return found;
};

const mix = (node) => {
  const bar = el("span", { class: "mix", "aria-hidden": "true" });
  for (const [kind, bytes] of node.mix) {
    const part = el("i", { kind });
    part.style.flexGrow = String(Math.max(bytes, 1));
    bar.append(part);
  }
  return bar;
};

const moduleCells = (node) => [
  el("span", { class: "name" },
    el("span", { class: "arrow", "aria-hidden": "true" }, "▶"),
    el("span", { class: "text", title: sortal.show(node.path) }, lastKey(node)),
    el("span", { class: "cls" }, factsOf(node)?.cls ?? "")),
  el("span", { class: "what" }, mix(node)),
  el("span", { class: "value" }, node.count === 0 ? "shared" : test === null ? leafCount(node.count)
    : `${node.hits.toLocaleString("en-US")} of ${leafCount(node.count)}`),
  el("span", { class: "number" }, node.count ? size(node.bytes) : "–"),
  ...(hasSpecs ? [el("span", { class: "spec" }), el("span", { class: "device" })] : []),
];

const toggle = (node, open = !node.open) => {
  if (isLeaf(node) || node === root || node.open === open) return;
  node.open = open;
  list();
  drawTree();
};

const select = (node, scroll = true) => {
  active = node;
  if (scroll) {
    const height = rowHeight();
    const at = visible.indexOf(node) * height;
    if (at < tree.scrollTop) tree.scrollTop = at;
    else if (at + height > tree.scrollTop + tree.clientHeight) {
      tree.scrollTop = at + height - tree.clientHeight;
    }
  }
  drawTree();
  drawDetail(node);
};

// Unfolds what is above a node, and goes there.
const go = (node) => {
  openTab("tree");
  for (let up = node.up; up; up = up.up) up.open = true;
  if (test !== null && !node.hits) $("only").checked = false;
  list();
  drawTree();
  const middle = visible.indexOf(node) * rowHeight() - tree.clientHeight / 2;
  tree.scrollTop = Math.max(0, middle);
  select(node);
  tree.focus({ preventScroll: true });
};

const everyNode = (node, act) => { act(node); below(node).forEach((n) => everyNode(n, act)); };
const foldAll = (open) => {
  everyNode(root, (n) => { n.open = n === root || open; });
  list();
  // The selected row may be folded away: what holds it takes its place.
  while (active.up && active.up !== root && !visible.includes(active)) active = active.up;
  select(active);
};
$("unfold").addEventListener("click", () => foldAll(true));
$("fold").addEventListener("click", () => foldAll(false));
tree.addEventListener("scroll", () => requestAnimationFrame(drawTree), { passive: true });
new ResizeObserver(() => drawTree()).observe(tree);

tree.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const at = visible.indexOf(active);
  const page = Math.max(1, Math.floor(tree.clientHeight / rowHeight()) - 1);
  const to = (i) => visible.length && select(visible[Math.max(0, Math.min(visible.length - 1, i))]);
  const acts = {
    ArrowDown: () => to(at + 1),
    ArrowUp: () => to(at - 1),
    PageDown: () => to(at + page),
    PageUp: () => to(at - page),
    Home: () => to(0),
    End: () => to(visible.length - 1),
    ArrowRight: () => (active.open || isLeaf(active) ? !isLeaf(active) && to(at + 1) : toggle(active)),
    ArrowLeft: () => {
      if (active.open && !isLeaf(active) && active !== root) toggle(active);
      else if (active.up && active.up !== root) select(active.up);
    },
    Enter: () => (isLeaf(active) ? active.leaf.aliases.length && go(nextPath(active)) : toggle(active)),
    " ": () => toggle(active),
    "*": () => { if (active.up) below(active.up).forEach((n) => { n.open = true; }); list(); drawTree(); },
  };
  if (!Object.hasOwn(acts, e.key)) return;
  e.preventDefault();
  acts[e.key]();
});
const nextPath = (node) => {
  const all = rowsOf[node.leaf.number];
  return all[(all.indexOf(node) + 1) % all.length];
};

// -------------------------------------------------------------------------- filter
const ask = $("filter");
const countHits = () => {
  everyNode(root, (n) => { n.hits = 0; });
  if (test === null) return [];
  const found = leaves.filter(matches);
  for (const leaf of found) {
    for (const node of rowsOf[leaf.number]) {
      // What is above a second path shows that it has something, and counts it not.
      for (let n = node; n; n = n.up) n.hits += node.alias ? 0 : 1;
      if (node.alias) node.hits = 1;
    }
  }
  return found;
};

const apply = () => {
  const text = ask.value.trim();
  const made = text ? read(text) : {};
  test = made.test ?? null;
  ask.setAttribute("aria-invalid", String(Boolean(made.error)));
  const found = countHits();
  const answer = $("answer");
  answer.classList.toggle("wrong", Boolean(made.error));
  if (made.error) answer.replaceChildren(made.error);
  else if (test === null) answer.replaceChildren(`All ${leafCount(leaves.length)}. A filter is written as in Python.`);
  else {
    const bytes = sum(found, (x) => x.bytes);
    answer.replaceChildren("takes ", el("b", {}, `${found.length.toLocaleString("en-US")} of ${leafCount(leaves.length)}`),
      `, ${big(sum(found, (x) => x.elements))} elements, ${size(bytes)} (${share(bytes, root.bytes)} of the bytes)`);
  }
  answer.dataset.count = test === null ? "" : String(found.length);
  for (const button of $("kinds").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.filter === text));
  }
  list();
  if (active !== root && !visible.includes(active) && visible.length) active = visible[0];
  drawTree();
  drawDetail(active);
  if (!$("panel-map").hidden) drawMap();
};
const setFilter = (text) => { ask.value = text; apply(); };
ask.addEventListener("input", apply);
$("only").addEventListener("change", apply);
$("clear").addEventListener("click", () => { setFilter(""); ask.focus(); });
$("ask").addEventListener("submit", (e) => e.preventDefault());
document.addEventListener("keydown", (e) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  if (e.key !== "/" || typing || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  ask.focus();
});

// Filters that say something about this model.
const examples = () => {
  const kinds = data.kinds.filter((k) => k.name !== null);
  const first = kinds.find((k) => /Param$/.test(k.label)) ?? kinds[0];
  const names = new Map();
  for (const leaf of leaves) {
    const key = leaf.path.at(-1);
    if (key?.plain && key.t) names.set(key.s, (names.get(key.s) ?? 0) + 1);
  }
  const name = [...names].sort((a, b) => b[1] - a[1])[0]?.[0];
  const top = below(root).filter((n) => !isLeaf(n)).sort((a, b) => b.bytes - a.bytes)[0];
  const glob = name && sortal.at([{ s: name }])?.replace(/^At\((.)/, "At($1**.");
  const under = top && sortal.at(top.path)?.replace(/^At/, "Under");
  return [
    first && glob && `${first.label} & ${glob}`,
    under && (first ? `${first.label} & ~${under}` : `~${under}`),
    "Shaped(ndim=2)",
    leaves.some((x) => x.dtype) && 'Dtyped("float32")',
  ].filter((text) => text && read(text).test);
};

// -------------------------------------------------------------------------- detail
const pair = (name, value, cls) => [el("dt", {}, name), el("dd", { class: cls ?? null }, value)];
const detail = $("detail");
const action = (label, onclick, cls) => el("button", { type: "button", class: cls ?? null, onclick, title: label }, label);

const drawDetail = (node) => {
  const close = el("button", { type: "button", class: "close", onclick: () => detail.classList.remove("asked") }, "Close");
  detail.replaceChildren(close, ...(isLeaf(node) ? leafDetail(node) : moduleDetail(node)));
};

const leafDetail = (node) => {
  const leaf = node.leaf;
  const above = leaf.kind.is.map((n) => data.classes[n][0]);
  const bases = [...new Set(above.slice(1, above.lastIndexOf("Variable") + 1))].filter((n) => n !== above[0]);
  const at = sortal.at(leaf.path);
  const others = rowsOf[leaf.number].filter((n) => n !== node);
  return [
    el("h2", {}, sortal.show(node.path)),
    el("p", {}, el("span", { class: "chip", kind: leaf.kind }, leaf.kind.label),
      el("span", { class: "soft" }, leaf.kind.name !== null && bases.length ? `, derived from ${bases.join(", ")}` : "")),
    el("dl", {},
      ...pair("value", leaf.text, "code"),
      ...(leaf.elements > 1 ? pair("elements", leaf.elements.toLocaleString("en-US")) : []),
      ...pair("bytes", size(leaf.bytes)),
      ...(leaf.spec ? pair("spec", leaf.spec, "code") : []),
      ...(leaf.by ? pair("given by", leaf.by) : []),
      ...(leaf.spec ? pair("on a device", size(leaf.device)) : []),
      ...(leaf.lies && leaf.lies !== leaf.spec ? pair("lies as", leaf.lies, "code") : [])),
    ...(others.length ? [
      el("h3", {}, node.alias ? "Tied: the same Variable as" : "Tied: also found at"),
      el("div", { class: "actions" }, ...others.slice(0, 20).map((n) => action(sortal.show(n.path), () => go(n), "path"))),
    ] : []),
    ...numbersOf(leaf),
    ...changesOf(leaf),
    ...(leaf.metadata ? [el("h3", {}, "Metadata"), el("pre", {}, leaf.metadata)] : []),
    el("h3", {}, "Filter by"),
    el("div", { class: "actions" },
      action(kindFilter(leaf.kind), () => setFilter(kindFilter(leaf.kind)), "path"),
      at ? action(at, () => setFilter(at), "path") : null),
  ];
};

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const numbersOf = (leaf) => {
  const found = data.numbers[leaf.number];
  if (!Array.isArray(found)) return [el("h3", {}, "Numbers"), el("p", { class: "soft" }, `None shown: ${found}.`)];
  const [low, high, mean, std, zeros, nans, infinities, count, most, code] = found;
  const rows = [];
  if (low === high && low !== null) rows.push(...pair(count === 1 ? "value" : "every number", number(low)));
  else if (low !== null) {
    rows.push(...pair("smallest", number(low)), ...pair("largest", number(high)));
    if (mean !== null) rows.push(...pair("mean", number(mean)));
    if (std !== null) rows.push(...pair("standard deviation", number(std)));
  }
  const counted = (n) => `${n.toLocaleString("en-US")} (${share(n, count)})`;
  rows.push(...pair("zeros", counted(zeros)));
  rows.push(...pair("NaNs", nans ? counted(nans) : "0", nans ? "bad" : null));
  rows.push(...pair("infinities", infinities ? counted(infinities) : "0", infinities ? "bad" : null));
  const drawn = low !== null && low !== high ? histogram(leaf, low, high, most, code) : [];
  return [el("h3", {}, "Numbers"), ...drawn, el("dl", {}, ...rows)];
};

const histogram = (leaf, low, high, most, code) => {
  const bins = [];
  for (let i = 0; i < code.length; i += 2) bins.push(DIGITS.indexOf(code[i]) * 64 + DIGITS.indexOf(code[i + 1]));
  const [a, b] = [Number(low), Number(high)];
  const picture = svg("svg", {
    class: "histogram", viewBox: "0 0 320 104", preserveAspectRatio: "none", role: "img", kind: leaf.kind,
    "aria-label": `Histogram of ${bins.length} bins from ${number(low)} to ${number(high)}; the fullest has ${most.toLocaleString("en-US")}`,
  });
  const width = 320 / bins.length;
  bins.forEach((h, i) => {
    if (!h) return;
    const height = Math.max(1.5, (h / 4095) * 102);
    picture.append(svg("rect", { x: i * width + 0.5, y: 103 - height, width: Math.max(width - 1, 1), height }));
  });
  picture.append(svg("line", { x1: 0, x2: 320, y1: 103.5, y2: 103.5 }));
  if (a < 0 && b > 0) {
    const x = (-a / (b - a)) * 320;
    picture.append(svg("line", { class: "zero", x1: x, x2: x, y1: 0, y2: 103 }));
  }
  return [picture, el("div", { class: "ends", "aria-hidden": "true" }, el("span", {}, number(low)), el("span", {}, number(high)))];
};

const moduleDetail = (node) => {
  const about = factsOf(node);
  const kinds = [...node.mix];
  const top = node === root ? data.about : [];
  const under = node === root ? null : sortal.at(node.path)?.replace(/^At/, "Under");
  return [
    el("h2", {}, node === root ? data.title : sortal.show(node.path)),
    el("p", { class: "soft" }, [about?.cls, leafCount(node.count), size(node.bytes)].filter(Boolean).join(", ")),
    ...(top.length ? [el("dl", {}, ...top.flatMap(([k, x]) => pair(k, x)))] : []),
    el("h3", {}, "Kinds"),
    el("dl", {}, ...kinds.flatMap(([kind, bytes]) => [
      el("dt", {}, el("span", { class: "chip", kind }, kind.label)), el("dd", {}, `${size(bytes)} (${share(bytes, node.bytes)})`),
    ])),
    ...(about?.statics.length ? [
      el("h3", {}, "Settings"),
      el("dl", {}, ...about.statics.flatMap(([k, x]) => pair(k, x, "code"))),
    ] : []),
    ...(under ? [el("h3", {}, "Filter by"), el("div", { class: "actions" }, action(under, () => setFilter(under), "path"))] : []),
  ];
};

// ------------------------------------------------------------------------- treemap
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

// ------------------------------------------------------------------------- changes
const changes = (data.changes?.rows ?? []).map(([path, kind, what, text, largest]) => ({
  path: path.map((n) => keys[n]), kind: data.kinds[kind], what, detail: data.texts[text], largest,
}));
const changesAt = new Map();
const numberAt = new Map(leaves.map((x) => [nodeAt(x.path), x.number]));
for (const c of changes) {
  c.number = c.what === "added" ? undefined : numberAt.get(nodeAt(c.path));
  if (c.number !== undefined) changesAt.set(c.number, [...(changesAt.get(c.number) ?? []), c]);
}
const changesOf = (leaf) => {
  const found = changesAt.get(leaf.number) ?? [];
  if (!found.length) return [];
  const rows = found.flatMap((c) => pair(c.what === "values" ? "values changed" : c.what, c.detail)
    .concat(c.largest === null ? [] : pair("largest difference", number(c.largest))));
  return [el("h3", {}, `In ${data.changes.title}`), el("dl", {}, ...rows)];
};

const WHAT = ["values", "shape", "dtype", "kind", "added", "removed", "unknown"];
const cellsOf = (tag, rows, numeric) => rows.map((x, i) => el(tag, { class: numeric[i] ? "number" : null, scope: tag === "th" ? "col" : null }, x));
const drawChanges = () => {
  const { title, kinds, values } = data.changes;
  const panel = $("panel-changes");
  const used = WHAT.filter((w) => kinds.some(([, , counts]) => counts[w]));
  const numeric = [false, true, ...used.map(() => true), true];
  const heads = ["kind", "in both", ...used.map((w) => (w === "values" ? "other values" : w === "unknown" ? "not compared" : w)), "largest difference"];
  const byKind = kinds.map(([label, both, counts, largest]) => {
    const kind = data.kinds.find((k) => k.label === label);
    return [el("span", { class: "chip", kind }, label), String(both), ...used.map((w) => String(counts[w] ?? 0)),
      largest === null ? "–" : number(largest)];
  });
  panel.append(
    el("p", {}, changes.length ? `From this to ${title}: ${plural(changes.length, "difference", "differences")}.`
      : `No difference from ${title}${values ? "" : " in structure"}.`),
    values ? "" : el("p", {}, "Values were not compared."),
    el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...cellsOf("th", heads, numeric))),
      el("tbody", {}, ...byKind.map((row) => el("tr", {}, ...cellsOf("td", row, numeric)))))),
  );
  if (!changes.length) return;
  const body = el("tbody");
  const more = el("button", { type: "button", onclick: () => add() });
  let at = 0;
  const add = () => {
    for (const c of changes.slice(at, at + 200)) {
      const where = c.number === undefined ? sortal.show(c.path)
        : el("button", { type: "button", class: "path", onclick: () => go(rowsOf[c.number][0]) }, sortal.show(c.path));
      body.append(el("tr", {}, el("td", { class: "path" }, where),
        el("td", {}, el("span", { class: "chip", kind: c.kind }, c.kind.label)),
        el("td", {}, c.what === "unknown" ? "" : c.what), el("td", {}, c.detail),
        el("td", { class: "number" }, c.largest === null ? "" : number(c.largest))));
    }
    at += 200;
    more.hidden = at >= changes.length;
    more.textContent = `Show more of ${changes.length.toLocaleString("en-US")}`;
  };
  add();
  panel.append(el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...cellsOf("th", ["path", "kind", "differs in", "", "largest difference"], [0, 0, 0, 0, 1]))), body)), more);
};

// ---------------------------------------------------------------------------- tabs
const TABS = ["tree", "map", "changes"];
const openTab = (name) => {
  for (const x of TABS) {
    $(`tab-${x}`).setAttribute("aria-selected", String(x === name));
    $(`tab-${x}`).setAttribute("tabindex", x === name ? "0" : "-1");
    $(`panel-${x}`).hidden = x !== name;
  }
  if (name !== "tree") detail.classList.remove("asked");
  if (name === "map") drawMap();
  if (name === "tree") drawTree();
};
for (const x of TABS) $(`tab-${x}`).addEventListener("click", () => openTab(x));
document.querySelector("[role=tablist]").addEventListener("keydown", (e) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (!step) return;
  const there = TABS.filter((x) => !$(`tab-${x}`).hidden);
  const at = there.findIndex((x) => $(`tab-${x}`) === document.activeElement);
  const name = there[(at + step + there.length) % there.length];
  openTab(name);
  $(`tab-${name}`).focus();
});

// ---------------------------------------------------------------------------- head
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;
const theme = () => {
  const now = chosen ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = now;
  $("theme").textContent = now === "dark" ? "Light theme" : "Dark theme";
};
$("theme").addEventListener("click", () => {
  chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  theme();
});
dark.addEventListener("change", theme);
theme();

const order = [...data.kinds].filter((k) => k.leaves.length).sort((a, b) => b.bytes - a.bytes);
const all = sum(leaves, (x) => x.elements);
$("summary").textContent = [
  leafCount(leaves.length), plural(order.length, "kind", "kinds"), plural(all, "element", "elements"), size(root.bytes),
  hasSpecs ? `${size(sum(leaves, (x) => x.device))} on a device` : "",
].filter(Boolean).join("  ·  ");
for (const kind of order) {
  const part = el("span", { kind });
  part.style.flexGrow = String(Math.max(kind.bytes, 0));
  $("share").append(part);
  $("kinds").append(el("li", {}, el("button", {
    type: "button", kind, "aria-pressed": "false", "data-filter": kindFilter(kind), title: kind.name ?? "arrays outside of Variables",
    onclick: () => setFilter(ask.value.trim() === kindFilter(kind) ? "" : kindFilter(kind)),
  }, el("span", { class: "swatch" }), el("b", {}, kind.label), el("small", {}, el("span", {}, `${leafCount(kind.leaves.length)}, `), size(kind.bytes)))));
}
$("share").setAttribute("aria-label", `Bytes by kind: ${order.map((k) => `${k.label} ${share(k.bytes, root.bytes)}`).join(", ")}`);
$("examples").append(...examples().map((text) => action(text, () => setFilter(text))));
ask.placeholder = examples()[0] ?? "...";
if (data.changes) {
  $("tab-changes").hidden = false;
  drawChanges();
}
apply();
})();
