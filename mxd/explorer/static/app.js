"use strict";
// Text of models and corpora only ever becomes text nodes: `make` and `append` interpret no markup.

const main = document.querySelector("main");
const PAGE = 50;
const view = { sort: "frequency", down: true, token: "", domain: "", active: true };
const loaded = new Map();
let site, drawn = 0, redraw = () => {};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

async function load(path) {
  if (!loaded.has(path)) {
    const file = fetch(`data/${path}`).then((reply) => {
      if (!reply.ok) throw new Error(`data/${path} cannot be read (${reply.status})`);
      return reply.json();
    });
    loaded.set(path, file);
    file.catch(() => loaded.delete(path));
  }
  return loaded.get(path);
}

async function ask(name, question) {
  const reply = await fetch(`api/${name}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question),
  });
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

const number = (value, digits = 3) => (value == null ? "–" : Number(value.toPrecision(digits)).toLocaleString("en", { maximumSignificantDigits: digits }));
const percent = (value) => (value == null ? "–" : `${number(100 * value)} %`);
const oneLine = (text) => text.replaceAll(/\s*\n\s*/g, " ↵ ");
const token = (text) => (text ? make("span", { class: "token", title: text }, oneLine(text)) : make("span", {}, "–"));
const link = (layer, expert) => make("a", { href: `#/${layer}/${expert}` }, String(expert));
const say = (text) => { document.querySelector("#status").textContent = text; };
const needsModel = (what) => make("p", { class: "faint" }, `${what} needs the model. Run `, make("code", {}, `mxd explore ${site.name}`), " on your machine.");

function table(label, heads, rows) {
  const kind = (place) => (typeof rows[0]?.[place] === "string" ? "number" : null);
  const head = heads.map((one, place) => make("th", { scope: "col", class: kind(place), ...one.attributes }, one.content ?? one));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((cell, place) => make("td", { class: kind(place) }, cell))));
  return make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": label },
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
}

// --- the list of a layer's experts

function chosen(experts) {
  const wanted = view.token.toLowerCase(), domain = site.domains.indexOf(view.domain);
  const has = (text) => text != null && text.toLowerCase().includes(wanted);
  const order = [];
  for (let n = 0; n < experts.frequency.length; n++) {
    if (view.active && !experts.frequency[n]) continue;
    if (wanted && !has(experts.token[n]) && !has(experts.promoted[n])) continue;
    if (domain >= 0 && experts.domain[n] !== domain) continue;
    order.push(n);
  }
  const column = experts[view.sort], sign = view.down ? -1 : 1;
  if (!column) return view.down ? order.reverse() : order;
  const compare = typeof column.find((value) => value != null) === "string" ? (a, b) => a.localeCompare(b) : (a, b) => a - b;
  return order.sort((a, b) => {
    const one = column[a], other = column[b];
    if (one == null || other == null) return (one == null) - (other == null) || a - b;
    return sign * compare(one, other) || a - b;
  });
}

async function showList(layer) {
  const experts = await load(`${layer}/experts.json`);
  const results = make("div"), plot = make("canvas", { role: "img" });
  const hint = make("p", { class: "faint" }, "Each point is an expert: click one to open it. The table below holds the same experts.");
  let order = [], shown = PAGE;

  function columnHead(name, title) {
    const state = view.sort === name ? (view.down ? "descending" : "ascending") : "none";
    const change = () => {
      view.down = view.sort === name ? !view.down : ["frequency", "maximum", "alignment"].includes(name);
      view.sort = name;
      update();
      results.querySelector(`[data-column="${name}"]`).focus();
    };
    const arrow = { ascending: " ▲", descending: " ▼", none: "" }[state];
    return { attributes: { "aria-sort": state }, content: make("button", { type: "button", "data-column": name, click: change }, title + arrow) };
  }

  function update() {
    order = chosen(experts);
    fill();
    say(`${order.length} experts`);
    redraw();
  }

  function fill() {
    const heads = [["expert", "Expert"], ["frequency", "Frequency"], ["maximum", "Maximum"], ["token", "Fires on"], ["promoted", "Promotes"], ["alignment", "Alignment"]];
    if (site.domains.length) heads.push(["domain", "Domain"]);
    const rows = order.slice(0, shown).map((n) => [
      link(layer, n), percent(experts.frequency[n]), number(experts.maximum[n]), token(experts.token[n]), token(experts.promoted[n]), number(experts.alignment[n], 2),
      ...(site.domains.length ? [token(site.domains[experts.domain[n]])] : []),
    ]);
    results.replaceChildren(make("p", {}, `${order.length.toLocaleString("en")} experts`), table("Experts", heads.map((head) => columnHead(...head)), rows));
    if (shown < order.length) {
      results.append(make("p", {}, make("button", { type: "button", click: () => {
        const before = shown;
        shown += PAGE;
        fill();
        results.querySelectorAll("tbody a")[before].focus();
      } }, `Show ${Math.min(PAGE, order.length - shown)} more`)));
    }
  }

  const change = (name, read) => (event) => { view[name] = read(event.target); shown = PAGE; update(); };
  const controls = make("div", { class: "row" },
    make("label", {}, "Token contains ", make("input", { size: 12, value: view.token, maxlength: 50, input: change("token", (field) => field.value) })),
    site.domains.length ? make("label", {}, "Domain ", make("select", { change: change("domain", (field) => field.value) },
      make("option", { value: "" }, "all"), ...site.domains.map((name) => make("option", { value: name, selected: name === view.domain }, name)))) : null,
    make("label", {}, make("input", { type: "checkbox", checked: view.active, change: change("active", (field) => field.checked) }), "active in this text"));
  order = chosen(experts);
  fill();
  return {
    title: `Layer ${layer}`,
    parts: [make("h1", {}, `Layer ${layer}: ${experts.frequency.length.toLocaleString("en")} experts`),
      site.warning ? make("p", { class: "warning" }, site.warning) : null, plot, hint, controls, results],
    ready: () => { redraw = scatter(plot, experts, () => order, (n) => { location.hash = `#/${layer}/${n}`; }); redraw(); },
  };
}

function scatter(canvas, experts, chosenNow, open) {
  const places = [];
  const extent = (values) => values.filter((value) => value > 0).reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, 0]);
  const [left, right] = extent(experts.frequency), [low, high] = extent(experts.maximum);
  const at = (value, from, to) => (to > from ? Math.log(value / from) / Math.log(to / from) : 0.5);
  canvas.setAttribute("aria-label", `Scatter plot: frequency from ${percent(left)} to ${percent(right)}, maximum from ${number(low)} to ${number(high)}, both logarithmic`);
  const nearest = (event) => {
    let best = 100, found = -1;
    for (const [n, x, y] of places) {
      const distance = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (distance < best) [best, found] = [distance, n];
    }
    return found;
  };
  canvas.addEventListener("click", (event) => { const n = nearest(event); if (n >= 0) open(n); });
  canvas.addEventListener("pointermove", (event) => {
    const n = nearest(event);
    canvas.title = n < 0 ? "" : `Expert ${n}: ${percent(experts.frequency[n])}, maximum ${number(experts.maximum[n])}`;
  });
  return () => {
    if (!canvas.isConnected) return;
    const { width, height } = canvas.getBoundingClientRect(), scale = devicePixelRatio || 1, style = getComputedStyle(canvas);
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const draw = canvas.getContext("2d");
    draw.scale(scale, scale);
    places.length = 0;
    draw.fillStyle = `rgba(${style.getPropertyValue("--dot")}, .45)`;
    for (const n of chosenNow()) {
      if (!(experts.frequency[n] > 0) || !(experts.maximum[n] > 0)) continue;
      const x = 46 + at(experts.frequency[n], left, right) * (width - 60), y = height - 36 - at(experts.maximum[n], low, high) * (height - 50);
      places.push([n, x, y]);
      draw.fillRect(x - 1.5, y - 1.5, 3, 3);
    }
    draw.fillStyle = style.getPropertyValue("--faint");
    draw.font = "12px system-ui, sans-serif";
    draw.fillText(percent(left), 46, height - 20);
    draw.textAlign = "right";
    draw.fillText(percent(right), width - 8, height - 20);
    draw.fillText(number(low), 40, height - 34);
    draw.fillText(number(high), 40, 18);
    draw.textAlign = "center";
    draw.fillText("frequency (log) →", width / 2, height - 6);
    draw.rotate(-Math.PI / 2);
    draw.fillText("maximum (log) →", -height / 2, 12);
  };
}

// --- an expert

async function showExpert(layer, expert) {
  const { experts: count } = site.layers.find((one) => one.layer === layer);
  if (expert >= count) throw new Error(`Layer ${layer} has no expert ${expert}: they are 0 to ${count - 1}.`);
  const found = (await load(`${layer}/${Math.floor(expert / site.chunk)}.json`))[expert % site.chunk];
  const step = (to, label) => (to < 0 || to >= count ? null : make("a", { href: `#/${layer}/${to}` }, label));
  const often = found.frequency ? `Active on ${percent(found.frequency)} of the tokens (1 in ${number(1 / found.frequency, 2)}), at most ${number(found.maximum)}.` : "Not active in this text.";
  const groups = found.contexts.flatMap(({ name, contexts }) => [make("h3", {}, name), ...contexts.map((one) => contextOf(one))]);
  const effects = (name, pairs) => make("div", {}, make("h3", {}, name), table(name, ["Token", "Logit"], pairs.map(([text, value]) => [token(text), number(value)])));
  const similar = found.similar.map(({ name, experts }) => make("div", {}, make("h3", {}, name),
    make("p", {}, ...experts.flatMap(([n, value]) => [link(layer, n), ` ${number(value, 2)}  `]))));
  return {
    title: `Expert ${expert}, layer ${layer}`,
    parts: [
      make("nav", { class: "row", "aria-label": "Neighbours" }, make("a", { href: `#/${layer}` }, `Layer ${layer}`), step(expert - 1, "← previous"), step(expert + 1, "next →")),
      make("h1", {}, `Expert ${expert}`), make("p", {}, often),
      make("div", { class: "columns" },
        make("section", { "aria-label": "Contexts" }, make("h2", {}, "Contexts"),
          make("p", { class: "faint" }, groups.length ? "Tokens on which the expert fires are marked, by its coefficient there; the framed one has the coefficient at the left. A click shows more of the text." : "None."), ...groups),
        make("section", { "aria-label": "Effects" }, make("h2", {}, "What its direction does to the logits"),
          found.promoted.length ? make("div", { class: "pair" }, effects("promotes", found.promoted), effects("suppresses", found.suppressed)) : make("p", { class: "faint" }, "Not measured: the decomposition has no directions."),
          found.alignment == null ? null : make("p", {}, `Alignment with the tokens that follow its contexts: ${number(found.alignment, 2)} standard deviations. `, make("span", { class: "faint" }, "An expert with a large one steers towards its contexts.")),
          make("h2", {}, "Coefficients"), histogram(found.histogram),
          found.domains.length ? make("h2", {}, "Domains") : null,
          found.domains.length ? table("Domains", ["Domain", "Share of its tokens"], found.domains.map(([name, share]) => [token(name), percent(share)])) : null,
          similar.length ? make("h2", {}, "Similar experts") : null, ...similar)),
      steering(layer, expert)],
  };
}

function contextOf({ value, row, position, parts }) {
  const text = make("span", { class: "text" }), active = parts.filter(Array.isArray);
  const mark = (piece, level, place) => make("mark", { class: `heat${level}${place === position ? " peak" : ""}` }, piece);
  const showShort = () => text.replaceChildren(...parts.map((one) => (Array.isArray(one) ? mark(oneLine(one[0]), one[1], one[2]) : oneLine(one))));
  showShort();
  const button = make("button", { type: "button", class: "context", "aria-expanded": "false", click: async () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", String(open));
    try {
      const pieces = open ? (await load(`rows/${Math.floor(row / site.chunk)}.json`))[row % site.chunk] : null;
      if (button.getAttribute("aria-expanded") !== String(open)) return;
      const levels = new Map(active.map(([, level, place]) => [place, level]));
      if (open) text.replaceChildren(...pieces.map((piece, place) => (levels.has(place) ? mark(piece, levels.get(place), place) : piece)));
      else showShort();
    } catch (error) { say(error.message); }
  } }, make("span", { class: "number" }, number(value)), text);
  return button;
}

function histogram(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return make("p", { class: "faint" }, "None.");
  const svg = (tag, attributes, ...children) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const used = counts.map((count, bin) => (count ? bin : -1)).filter((bin) => bin >= 0);
  const first = used[0], last = used[used.length - 1], width = 360 / (last - first + 1), most = Math.max(...counts);
  const label = (bin) => number(site.edges[bin], 2);
  const bars = counts.slice(first, last + 1).map((count, bin) => svg("rect", { x: bin * width, y: 90 - (86 * count) / most, width: Math.max(width - 1, .5), height: (86 * count) / most },
    svg("title", {}, `${label(first + bin)} to ${label(first + bin + 1)}: ${count.toLocaleString("en")} tokens`)));
  return svg("svg", { viewBox: "0 0 360 108", role: "img", "aria-label": `Histogram of coefficients on ${total} tokens, from ${label(first)} to ${label(last + 1)}` },
    ...bars, svg("text", { x: 0, y: 104 }, label(first)), svg("text", { x: 360, y: 104, "text-anchor": "end" }, label(last + 1)));
}

// --- steering

function steering(layer, expert) {
  const section = make("section", { id: "steer", "aria-label": "Steer" }, make("h2", {}, "Steer"));
  if (!site.api) return section.append(needsModel("Steering")), section;
  const field = (label, input) => make("label", {}, `${label} `, input);
  const option = (value, label) => make("option", { value }, label);
  const prompt = make("textarea", { name: "prompt", "aria-label": "Prompt", required: true, maxlength: 4000 }, sessionStorage.getItem("prompt") || "I think that");
  const strength = make("input", { type: "number", value: 2, step: "any" }), tokens = make("input", { type: "number", value: 30, min: 1, max: 200 });
  const by = make("select", {}, option("direction", "its direction, added"), option("add", "coefficient, added"), option("set", "coefficient, set"), option("scale", "coefficient, scaled"), option("ablate", "coefficient, removed"));
  const button = make("button", {}, "Steer"), results = make("div", { "aria-live": "polite" });
  const submit = async (event) => {
    event.preventDefault();
    sessionStorage.setItem("prompt", prompt.value);
    button.disabled = true;
    results.replaceChildren(make("p", {}, "Generating …"));
    try {
      const texts = await ask("steer", { layer, expert, prompt: prompt.value, strength: Number(strength.value), by: by.value, tokens: Number(tokens.value) });
      const box = (name, text) => make("div", {}, make("h3", {}, name), make("div", { class: "box text" }, make("span", { class: "faint" }, prompt.value), text));
      results.replaceChildren(make("div", { class: "pair" }, box("Untouched", texts.untouched), box("Steered", texts.steered)));
    } catch (error) { results.replaceChildren(make("p", { class: "warning" }, error.message)); }
    button.disabled = false;
  };
  section.append(make("form", { submit }, prompt, make("div", { class: "row" }, field("Strength", strength), field("by", by), field("New tokens", tokens), button)),
    make("p", { class: "faint" }, "A strength of 1 is the expert's own largest coefficient; as a scale it is a factor."), results);
  return section;
}

// --- search

async function showSearch(layer, text) {
  const experts = await load(`${layer}/experts.json`);
  const about = (n) => [token(experts.token[n]), token(experts.promoted[n]), number(experts.alignment[n], 2)];
  if (!site.api) return showWords(layer, text, about);
  const { tokens, experts: found } = await ask("inspect", { layer, text });
  const results = make("div");
  let only = -1;
  const heads = ["Expert", "On", "Of its maximum", "Share of output", "Unusual (bits)", "Fires on", "Promotes", "Alignment"];
  const update = () => {
    const rows = found.filter((one) => only < 0 || one.position === only).slice(0, 100);
    results.replaceChildren(table("Experts", heads, rows.map((one) => [link(layer, one.expert), token(tokens[one.position]), percent(one.relative), percent(one.share), number(one.unusual), ...about(one.expert)])));
    say(`${rows.length} experts`);
  };
  const heat = tokens.map((_, position) => Math.max(0, ...found.filter((one) => one.position === position).map((one) => one.unusual)));
  const hottest = Math.max(...heat, 1e-9);
  const pieces = tokens.map((piece, position) => make("button", { type: "button", class: `piece heat${Math.round((4 * heat[position]) / hottest)}`, "aria-pressed": "false", click: (event) => {
    only = only === position ? -1 : position;
    for (const other of pieces) other.setAttribute("aria-pressed", String(other === event.currentTarget && only >= 0));
    update();
  } }, piece));
  update();
  return { title: `Search: ${text}`, parts: [make("h1", {}, "Experts active on this text"), make("div", { class: "texts box" }, ...pieces),
    make("p", { class: "faint" }, "The most unusual first: an expert that is rarely active, or rarely so strongly. Choose a token to see its experts only."), results] };
}

async function showWords(layer, text, about) {
  const words = await load(`${layer}/words.json`), scores = new Map();
  const asked = [...new Set(text.toLowerCase().match(/[\p{L}\p{N}]+/gu) || [])];
  for (const word of asked) {
    const pairs = Object.hasOwn(words, word) ? words[word] : [];
    for (let place = 0; place < pairs.length; place += 2) {
      const [hits, contexts] = scores.get(pairs[place]) || [0, 0];
      scores.set(pairs[place], [hits + 1, contexts + pairs[place + 1]]);
    }
  }
  const found = [...scores].sort(([a, one], [b, other]) => other[0] - one[0] || other[1] - one[1] || a - b).slice(0, 100);
  const rows = found.map(([n, [hits, contexts]]) => [link(layer, n), String(hits), String(contexts), ...about(n)]);
  say(`${rows.length} experts`);
  return { title: `Search: ${text}`, parts: [make("h1", {}, "Experts with these words in their contexts"),
    rows.length ? table("Experts", ["Expert", "Words", "Contexts", "Fires on", "Promotes", "Alignment"], rows) : make("p", {}, "None."), needsModel("To search by a text's own experts")] };
}

// --- addresses: #/LAYER, #/LAYER/EXPERT, #/LAYER/search/TEXT

async function route() {
  const turn = ++drawn;
  redraw = () => {};
  try {
    site ??= await load("index.json").then(prepare);
    const [, first, second, text] = location.hash.match(/^#\/(\d+)(?:\/(\d+|search)(?:\/(.*))?)?$/) || [];
    const layer = first === undefined ? site.layers[0].layer : Number(first);
    if (!site.layers.some((one) => one.layer === layer)) throw new Error(`There is no layer ${layer} here.`);
    document.querySelector("#layers select").value = layer;
    main.setAttribute("aria-busy", "true");
    const page = second === undefined ? await showList(layer) : second === "search" ? await showSearch(layer, decodeURIComponent(text || "")) : await showExpert(layer, Number(second));
    if (turn !== drawn) return;
    document.title = `${page.title} – ${site.name}`;
    main.replaceChildren(...page.parts.filter((part) => part != null));
    page.ready?.();
  } catch (error) {
    if (turn !== drawn) return;
    main.replaceChildren(make("h1", {}, "This page cannot be shown"), make("p", { role: "alert" }, error.message));
  }
  main.removeAttribute("aria-busy");
  if (turn > 1) { main.focus({ preventScroll: true }); scrollTo(0, 0); }
}

function prepare(index) {
  site = index;
  document.querySelector("#home").textContent = site.name;
  document.querySelector("#about").textContent = site.about;
  const choice = document.querySelector("#layers select");
  choice.append(...site.layers.map(({ layer }) => make("option", { value: layer }, String(layer))));
  document.querySelector("#layers").hidden = site.layers.length < 2;
  choice.addEventListener("change", () => { location.hash = `#/${choice.value}`; });
  return site;
}

document.querySelector("#search").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = event.target.querySelector("input").value.trim(), layer = document.querySelector("#layers select").value;
  if (text) location.hash = /^\d+$/.test(text) ? `#/${layer}/${text}` : `#/${layer}/search/${encodeURIComponent(text)}`;
});
addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const rows = [...main.querySelectorAll("tbody a, .context")], place = rows.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "/") document.querySelector("#search input").focus();
  else if (step && place >= 0) rows[Math.max(0, Math.min(rows.length - 1, place + step))].focus();
  else if ((event.key === "ArrowLeft" || event.key === "ArrowRight") && !event.target.matches(".scroll")) {
    const [, layer, expert] = location.hash.match(/^#\/(\d+)\/(\d+)$/) || [];
    const next = Number(expert) + (event.key === "ArrowRight" ? 1 : -1);
    if (expert !== undefined && next >= 0) location.hash = `#/${layer}/${next}`;
    return;
  } else return;
  event.preventDefault();
});
addEventListener("hashchange", route);
addEventListener("resize", () => redraw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw());
route();
