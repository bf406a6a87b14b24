// What differs from a second model.
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
