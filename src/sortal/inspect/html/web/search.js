// The field for a filter, and what it answers.
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
