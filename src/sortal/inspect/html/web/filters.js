// The leaves of a page, and the filters that may be typed in it. A filter is read as
// Python would read it, so that what works here works in a program, and the reverse.
"use strict";
const sortal = {};

// ------------------------------------------------------------------------- leaves
// A key of a path as an object: s is what globs compare, r how Python writes it.
sortal.key = (k) => {
  if (typeof k === "number") return { s: String(k), r: String(k), n: k, plain: true };
  if (typeof k === "string") return { s: k, r: sortal.quote(k), t: "str", plain: true };
  return k;
};

sortal.quote = (text) => {
  const q = text.includes("'") && !text.includes('"') ? '"' : "'";
  const inside = text.replaceAll("\\", "\\\\").replaceAll(q, "\\" + q);
  return q + inside.replaceAll("\n", "\\n") + q;
};

// A path as the library shows it: layers.0['a b'].
sortal.show = (path) => {
  let text = "";
  for (const k of path) {
    if (k.plain) text += (text ? "." : "") + k.s;
    else text += `[${k.r}]`;
  }
  return text || "<root>";
};

// The keys of a page; two that look alike still have two numbers.
sortal.keys = (data) => data.keys.map((k, id) => ({ ...sortal.key(k), id }));

sortal.leaves = (data) => {
  const keys = sortal.keys(data);
  const path = (numbers) => numbers.map((n) => keys[n]);
  const all = data.leaves;
  // Arrays in no Variable are of several types, which filters tell apart, and no kind.
  const raw = data.kinds.find((kind) => kind.name === null);
  let last = [];
  const found = all.path.map(([same, ...rest], i) => {
    last = [...last.slice(0, same), ...path(rest)];
    const shape = all.shape[i] < 0 ? null : data.shapes[all.shape[i]];
    return {
      number: i,
      path: last,
      type: data.kinds[all.kind[i]],
      kind: data.kinds[all.kind[i]].name === null ? raw : data.kinds[all.kind[i]],
      dtype: all.dtype[i] < 0 ? null : data.dtypes[all.dtype[i]],
      shape,
      text: data.texts[all.text[i]],
      elements: all.elements[i],
      bytes: all.bytes[i],
      device: all.device[i],
      spec: data.texts[all.spec[i]],
      by: data.texts[all.by[i]],
      lies: data.texts[all.lies[i]],
      tag: all.tag[i] < 0 ? null : data.texts[all.tag[i]],
      metadata: data.texts[all.metadata[i]],
      aliases: [],
    };
  });
  for (const [i, others] of all.aliases) found[i].aliases = others.map(path);
  return found;
};

// --------------------------------------------------------------------------- globs
// For each entry of a glob the literal texts around its stars.
sortal.glob = (pattern) => {
  const entries = [[""]];
  const add = (c) => { entries.at(-1)[entries.at(-1).length - 1] += c; };
  const chars = [...pattern];
  for (let i = 0; i < chars.length; i++) {
    if (chars[i] === "\\") {
      i++;
      if (!["\\", ".", "*"].includes(chars[i])) return null;
      add(chars[i]);
    } else if (chars[i] === ".") entries.push([""]);
    else if (chars[i] === "*") entries.at(-1).push("");
    else add(chars[i]);
  }
  return entries.some((e) => e.length === 1 && e[0] === "") ? null : entries;
};

const isAny = (entry) => entry.length === 3 && entry.every((text) => text === "");

const fitsEntry = (texts, key) => {
  if (texts.length === 1) return key === texts[0];
  const first = texts[0], last = texts.at(-1);
  if (key.length < first.length + last.length) return false;
  if (!key.startsWith(first) || !key.endsWith(last)) return false;
  let at = first.length;
  const end = key.length - last.length;
  for (const text of texts.slice(1, -1)) {
    const found = key.indexOf(text, at);
    if (found < 0 || found + text.length > end) return false;
    at = found + text.length;
  }
  return true;
};

// Whether a path fits; where `**` may be any number of entries the first place that
// fits will do, and one step back to the last `**` is enough.
const fits = (entries, path) => {
  let e = 0, p = 0, star = -1, from = 0;
  while (p < path.length) {
    if (e < entries.length && isAny(entries[e])) { star = e++; from = p; }
    else if (e < entries.length && fitsEntry(entries[e], path[p].s)) { e++; p++; }
    else if (star >= 0) { e = star + 1; p = ++from; }
    else return false;
  }
  while (e < entries.length && isAny(entries[e])) e++;
  return e === entries.length;
};

// The glob that takes exactly one path; null where no glob can.
sortal.at = (path) => {
  if (!path.length || path.some((k) => k.s === "")) return null;
  const escaped = path.map((k) => k.s.replace(/[\\.*]/g, "\\$&")).join(".");
  return escaped.includes("\\") || /['"\n]/.test(escaped)
    ? `At(${sortal.quote(escaped)})` : `At("${escaped}")`;
};

// ------------------------------------------------------------------------- reading
class Unread extends Error {}
const no = (why) => { throw new Unread(why); };

const TOKEN = /\s*(?:(\.\.\.)|([A-Za-z_\u0080-\uffff][\w\u0080-\uffff]*)|(-?\d+(?![\w.]))|([&|~()[\],.=]))/y;
// A string may begin like a name, so it is looked for first.
const STRING = /\s*([rR]?(?:"(?:[^"\\\n]|\\[^])*"|'(?:[^'\\\n]|\\[^])*'))/y;
const ESCAPES = { n: "\n", t: "\t", r: "\r", "\\": "\\", "'": "'", '"': '"', "\n": "", a: "\x07", b: "\b", f: "\f", v: "\v" };

const tokens = (text) => {
  const found = [];
  const end = text.trimEnd().length;
  let at = 0;
  while (at < end) {
    STRING.lastIndex = at;
    const quoted = STRING.exec(text);
    if (quoted) {
      found.push({ what: "string", value: unquote(quoted[1]), text: quoted[1] });
      at = STRING.lastIndex;
      continue;
    }
    TOKEN.lastIndex = at;
    const m = TOKEN.exec(text);
    if (!m) {
      const rest = text.slice(at).trimStart();
      if (/^[rR]?["']/.test(rest)) no(`the string ${cut(rest)} has no end`);
      no(`cannot read ${cut(rest)}: a filter is made of kinds, At("..."), Under("..."), `
        + "strings, &, |, ~ and parentheses");
    }
    at = TOKEN.lastIndex;
    const [, dots, name, number, sign] = m;
    if (dots) found.push({ what: "dots", text: dots });
    else if (Object.hasOwn(WORDS, name ?? "")) no(WORDS[name]);
    else if (name) found.push({ what: "name", value: name, text: name });
    else if (number) found.push({ what: "number", value: Number(number), text: number });
    else found.push({ what: sign, text: sign });
  }
  found.push({ what: "end", text: "the end" });
  return found;
};

const WORDS = {
  lambda: "a function is not read here, for it needs Python",
  and: "and gives one of its two sides, not both: write &",
  or: "or gives one of its two sides, not both: write |",
  not: "not gives True or False, not a filter: write Not(...)",
};

const cut = (text) => (text.length > 24 ? text.slice(0, 24) + "…" : text);

const unquote = (literal) => {
  const raw = /^[rR]/.test(literal);
  const inside = literal.slice(raw ? 2 : 1, -1);
  if (raw) return inside;
  return inside.replace(/\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|([^]))/gi, (whole, x, u, U, c) => {
    if (c === undefined) {
      // Python tells \x from \X, and has no character beyond 10ffff.
      if (!/^\\[xuU]/.test(whole)) return whole;
      const code = parseInt(x ?? u ?? U, 16);
      return code > 0x10ffff ? no(`there is no character ${whole}`) : String.fromCodePoint(code);
    }
    if (Object.hasOwn(ESCAPES, c)) return ESCAPES[c];
    if (/[xuUN0-7]/.test(c)) no(`the escape ${whole} is not read here`);
    return whole; // as Python keeps a backslash that escapes nothing
  });
};

// Values while reading: a filter is a function of a leaf; classes, strings, numbers,
// tuples and lists are what Python has before it makes a filter of them.
const filter = (test) => ({ is: "filter", test });

const reader = (text, names) => {
  const all = tokens(text);
  let at = 0;
  const peek = () => all[at].what;
  const next = () => all[at++];
  const want = (what) => {
    if (peek() !== what) no(`expected ${what} before ${cut(all[at].text)}`);
    return next();
  };
  const either = () => binary("|", both);
  const both = () => binary("&", unary);
  const binary = (sign, inner) => {
    let left = inner();
    while (peek() === sign) {
      next();
      left = combine(sign, left, inner());
    }
    return left;
  };
  const unary = () => {
    if (peek() !== "~") return atom();
    next();
    const x = unary();
    if (x.is !== "filter") {
      no(`~ stands before a filter, and ${describe(x)} is none: write Not(...)`);
    }
    return negated(x);
  };
  const items = (end) => {
    const found = [];
    let comma = false;
    while (peek() !== end) {
      found.push(either());
      comma = peek() === ",";
      if (comma) next();
      else if (peek() !== end) want(end);
    }
    next();
    return [found, comma];
  };
  const call = (made) => {
    const positional = [], named = {};
    while (peek() !== ")") {
      if (peek() === "name" && all[at + 1].what === "=") {
        const name = next().value;
        next();
        if (name in named) no(`${name} is given twice`);
        named[name] = either();
      } else {
        if (Object.keys(named).length) no("a positional argument follows a named one");
        positional.push(either());
      }
      if (peek() === ",") next();
      else if (peek() !== ")") want(")");
    }
    next();
    if (!made.make) no(`${describe(made)} is no filter that takes arguments`);
    return made.make(positional, named);
  };
  const atom = () => {
    const t = next();
    let x;
    if (t.what === "dots") x = { is: "dots" };
    else if (t.what === "number") x = { is: "number", value: t.value };
    else if (t.what === "string") {
      x = { is: "string", value: t.value };
      while (peek() === "string") x.value += next().value;
    } else if (t.what === "(") {
      const [found, comma] = items(")");
      x = found.length === 1 && !comma ? found[0] : { is: "tuple", items: found };
    } else if (t.what === "[") x = { is: "list", items: items("]")[0] };
    else if (t.what === "name") {
      const parts = [t.value];
      while (peek() === ".") { next(); parts.push(want("name").value); }
      x = names(parts);
    } else no(t.what === "end" ? "the expression is not finished"
      : `did not expect ${cut(t.text)} here`);
    while (peek() === "(") { next(); x = call(x); }
    if (peek() === "[") no("brackets after a name are not read here: write the kind alone");
    if (peek() === ".") no(`${describe(x)} has no attributes`);
    return x;
  };
  const found = [either()];
  let comma = false;
  while (peek() === ",") {
    comma = true;
    next();
    if (peek() !== "end") found.push(either());
  }
  if (peek() !== "end") no(`did not expect ${cut(all[at].text)} here`);
  return comma ? { is: "tuple", items: found } : found[0];
};

const DESCRIBE = {
  class: (x) => x.name,
  filter: () => "a filter",
  string: (x) => `the string ${sortal.quote(x.value)}`,
  number: (x) => `the number ${x.value}`,
  bool: (x) => (x.value ? "True" : "False"),
  none: () => "None",
  dots: () => "...",
  tuple: () => "a tuple",
  list: () => "a list",
  union: () => "a union of classes",
  dtype: (x) => `the dtype ${x.name}`,
};
const describe = (x) => DESCRIBE[x.is](x);

const isClass = (x) => x.is === "class" || x.is === "union" || x.is === "none";

// What Python's operators do: a filter on either side makes a filter of the other.
const combine = (sign, a, b) => {
  if (a.is === "bool" && b.is === "bool") {
    return { is: "bool", value: sign === "&" ? a.value && b.value : a.value || b.value };
  }
  if (a.is === "filter" || b.is === "filter") {
    const [f, g] = [made(a), made(b)];
    return sign === "&" ? filter((x) => f(x) && g(x)) : filter((x) => f(x) || g(x));
  }
  if (sign === "|" && isClass(a) && isClass(b) && !(a.is === "none" && b.is === "none")) {
    const members = (x) => (x.is === "union" ? x.items : [x]);
    return { is: "union", items: [...members(a), ...members(b)] };
  }
  const write = sign === "&" ? "All" : "Any";
  return no(`Python has no ${sign} between ${describe(a)} and ${describe(b)}: `
    + `write ${write}(..., ...)`);
};

const negated = (x) => filter((leaf) => !x.test(leaf));

// The test of what is to be a filter.
const made = (x) => {
  if (x.is === "filter") return x.test;
  if (x.is === "dots") return () => true;
  if (x.is === "bool") return () => x.value;
  if (x.is === "none") return () => false;
  if (x.is === "string") return (leaf) => leaf.tag === x.value;
  if (x.is === "class") return x.make ? x.make([], {}).test : x.takes;
  if (x.is === "union" && x.items.some((c) => c.is === "none")) {
    no("None beside a class is the class of None, which takes nothing: leave it out");
  }
  if (x.is === "union" || x.is === "tuple" || x.is === "list") {
    const tests = x.items.map(made);
    return (leaf) => tests.some((test) => test(leaf));
  }
  return no(`${describe(x)} is not a filter`);
};

// -------------------------------------------------------- the filters of the library
const one = (name, args, named, ...allowed) => {
  const extra = Object.keys(named).filter((k) => !allowed.includes(k));
  if (extra.length) no(`${name} takes no ${extra[0]}=`);
  const keyword = allowed[0] in named ? [named[allowed[0]]] : [];
  const found = [...args, ...keyword];
  if (found.length !== 1) no(`${name} takes one argument, found ${found.length}`);
  return found[0];
};

const pattern = (name, x) => {
  if (x.is !== "string") no(`${name} takes a path as a string, found ${describe(x)}`);
  const entries = sortal.glob(x.value);
  if (!entries) {
    no(`${name}(${sortal.quote(x.value)}): a path is entries joined by single dots, `
      + "and a backslash stands before a dot, a star or a backslash of an entry");
  }
  return entries;
};

const sameKey = (x, key) => {
  if (x.is === "string") return (key.t === "str") && key.s === x.value;
  if (x.is === "number") return key.n === x.value;
  if (x.is === "bool") return key.n === Number(x.value);
  return no(`${describe(x)} is no entry of a path that is read here`);
};

const strOf = (x) => {
  if (x.is === "string") return x.value;
  if (x.is === "number") return String(x.value);
  if (x.is === "bool") return x.value ? "True" : "False";
  return no(`${describe(x)} is no entry of a path that is read here`);
};

const integer = (name, x) => (x.is === "number" ? x.value
  : no(`${name} wants integers, found ${describe(x)}`));

const FILTERS = {
  Everything: (args, named) => (args.length || Object.keys(named).length
    ? no("Everything takes no arguments") : filter(() => true)),
  Nothing: (args, named) => (args.length || Object.keys(named).length
    ? no("Nothing takes no arguments") : filter(() => false)),
  Any: (args, named) => several("Any", args, named, (tests, x) => tests.some((t) => t(x))),
  All: (args, named) => several("All", args, named, (tests, x) => tests.every((t) => t(x))),
  Not: (args, named) => {
    const test = made(one("Not", args, named));
    return filter((x) => !test(x));
  },
  OfType: (args, named) => {
    const x = one("OfType", args, named, "type");
    if (x.is !== "class" || x.make) no(`OfType takes a kind, found ${describe(x)}`);
    return filter(x.takes);
  },
  WithTag: (args, named) => {
    const x = one("WithTag", args, named, "tag");
    if (x.is !== "string") no(`WithTag takes a string, found ${describe(x)}`);
    return filter((leaf) => leaf.tag === x.value);
  },
  At: (args, named) => {
    const entries = pattern("At", one("At", args, named, "pattern"));
    return filter((x) => fits(entries, x.path));
  },
  Under: (args, named) => {
    const entries = [...pattern("Under", one("Under", args, named, "prefix")), ["", "", ""]];
    return filter((x) => fits(entries, x.path));
  },
  PathContains: (args, named) => {
    const { exact = args[1] ?? { is: "bool", value: true }, ...rest } = named;
    if (args.length > 2 || (args.length === 2 && "exact" in named)) {
      no("PathContains takes a key and exact=");
    }
    const x = one("PathContains", args.slice(0, 1), rest, "key");
    if (exact.is !== "bool") no("exact= is True or False");
    if (exact.value) {
      sameKey(x, { s: "" });
      return filter((leaf) => leaf.path.some((k) => sameKey(x, k)));
    }
    const text = strOf(x);
    return filter((leaf) => leaf.path.some((k) => k.s.includes(text)));
  },
  PathIn: (args, named) => {
    if (Object.keys(named).length) no("PathIn takes paths alone");
    for (const p of args) {
      if (p.is !== "tuple") no(`PathIn takes paths as tuples, found ${describe(p)}`);
      p.items.forEach((x) => sameKey(x, { s: "" }));
    }
    return filter((leaf) => args.some((p) => p.items.length === leaf.path.length
      && p.items.every((x, i) => sameKey(x, leaf.path[i]))));
  },
  Shaped: (args, named) => {
    const extra = Object.keys(named).filter((k) => k !== "shape" && k !== "ndim");
    if (extra.length) no(`Shaped takes no ${extra[0]}=`);
    if (args.length > 1 || (args.length && "shape" in named)) no("Shaped takes one shape");
    const given = args[0] ?? named.shape ?? { is: "none" };
    const count = named.ndim ?? { is: "none" };
    const list = given.is === "tuple" || given.is === "list";
    if (!list && given.is !== "none") no(`a shape is a tuple, found ${describe(given)}`);
    const shape = list ? given.items.map((x) => integer("Shaped", x)) : null;
    const ndim = count.is === "none" ? null : integer("ndim=", count);
    if (shape === null && ndim === null) no("Shaped() needs shape=(...) or ndim=...");
    if (shape !== null && ndim !== null && shape.length !== ndim) {
      no(`a shape of ${shape.length} axes and ndim=${ndim} can take nothing`);
    }
    return filter((x) => x.shape !== null
      && (shape === null || (shape.length === x.shape.length
        && shape.every((n, i) => n === x.shape[i])))
      && (ndim === null || x.shape.length === ndim));
  },
};

const several = (name, args, named, test) => {
  if (Object.keys(named).length) no(`${name} takes filters alone`);
  const tests = args.map(made);
  return filter((x) => test(tests, x));
};

// ---------------------------------------------------------------------------- names
const HOMES = new Set(["sortal", "nnx", "flax.nnx", "sortal.nnx", "sortal.filters"]);
const DTYPE_HOMES = new Set(["jnp", "np", "numpy", "jax.numpy", "jax.dtypes"]);
const ALIASES = { np: "numpy", "jax.numpy": "jax.numpy" };

// A function from the parts of a dotted name to what it stands for.
const resolver = (data) => {
  const twins = new Map(data.twins.flatMap(([a, b]) => [[a, a], [b, a]]));
  const group = (full) => twins.get(full) ?? full;
  const classes = data.classes.map(([name, full]) => ({ name, full, group: group(full) }));
  const takers = data.kinds.map((k) => [k, new Set(k.is.map((n) => classes[n].group))]);
  const byType = new Map(takers);
  const asClass = (name, g) => ({
    is: "class", name, takes: (leaf) => byType.get(leaf.type).has(g),
  });
  const dtyped = (args, named) => {
    const x = one("Dtyped", args, named, "dtype");
    const known = x.is === "dtype" || (x.is === "string" && data.dtypeTexts.includes(x.value));
    const name = x.is === "dtype" ? x.name : x.value;
    if (!known) no(`Dtyped(...) takes a dtype such as "float32" or jnp.floating, found ${describe(x)}`);
    return filter((leaf) => leaf.dtype !== null && leaf.dtype[1].includes(name));
  };
  return (parts) => {
    const name = parts.at(-1), home = parts.slice(0, -1).join(".");
    if (!home && name === "True") return { is: "bool", value: true };
    if (!home && name === "False") return { is: "bool", value: false };
    if (!home && name === "None") return { is: "none" };
    if (!home && name === "Ellipsis") return { is: "dots" };
    if (!home || HOMES.has(home)) {
      if (name === "Dtyped") return { is: "class", name, make: dtyped };
      if (Object.hasOwn(FILTERS, name)) return { is: "class", name, make: FILTERS[name] };
    }
    if (DTYPE_HOMES.has(home) && data.dtypeNames.includes(name)) return { is: "dtype", name };
    let found = classes.filter((c) => c.name === name);
    if (home) {
      const full = `${ALIASES[home] ?? home}.${name}`;
      found = found.filter((c) => `.${c.full}`.endsWith(`.${full}`)
        || (HOMES.has(home) && /^(sortal|flax)\./.test(c.full)));
    }
    const groups = [...new Set(found.map((c) => c.group))];
    if (groups.length === 1) return asClass(name, groups[0]);
    const label = data.kinds.find((k) => k.name !== null && k.label === parts.join("."));
    if (label) return asClass(name, group(label.name));
    if (groups.length > 1) {
      no(`${groups.length} kinds are called ${name}: write ${groups.join(" or ")}`);
    }
    const here = data.kinds.filter((k) => k.name !== null).map((k) => k.label);
    return no(`there is no kind or filter ${parts.join(".")} here; the kinds here are `
      + (here.join(", ") || "none, for this file has arrays alone"));
  };
};

// Reads a filter: {test} is a function of a leaf, or {error} says why there is none.
sortal.filters = (data) => {
  const names = resolver(data);
  return (text) => {
    try {
      return { test: made(reader(text, names)) };
    } catch (e) {
      if (e instanceof Unread) return { error: e.message };
      if (e instanceof RangeError) return { error: "the expression is nested too deeply" };
      throw e;
    }
  };
};
