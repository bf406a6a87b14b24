// What the page is about, and how elements, numbers and colours are made. All text is set
// as text, never as HTML, because names in a file are anybody's.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const leaves = sortal.leaves(data);
const read = sortal.filters(data);
const $ = (id) => document.getElementById(id);

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
