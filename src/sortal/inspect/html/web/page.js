// Tabs, theme and heading; and the first drawing.
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

// ------------------------------------------------------------------------- heading
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
