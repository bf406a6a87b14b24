// The tree of leaves by path: what is in sight is drawn, so that size costs nothing.
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
