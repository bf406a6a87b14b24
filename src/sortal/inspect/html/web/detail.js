// What is known of the row that is selected.
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
