"use strict";
// The page that tries a request: a form made of the server's sample, the ranking, and what moved each score.

let sample = null;
let rows = 0;

// How a column's values are read from its field: what the sample has there says it.
function kindOf(values) {
  const flat = values.flat(1).filter((value) => value !== null);
  return {
    list: values.some(Array.isArray),
    number: flat.length > 0 && flat.every((value) => typeof value === "number"),
  };
}

function shown(value) {
  if (value === null || value === undefined) return "";
  return Array.isArray(value) ? value.join(", ") : String(value);
}

function read(name, text, kind) {
  const one = (part) => {
    if (!kind.number) return part;
    const number = Number(part);
    if (!Number.isFinite(number)) throw new Error(name + ": " + part + " is no number");
    return number;
  };
  const trimmed = text.trim();
  if (kind.list) return trimmed === "" ? [] : trimmed.split(",").map((part) => one(part.trim()));
  return trimmed === "" ? null : one(trimmed);
}

function field(name, value) {
  const input = element("input");
  input.value = shown(value);
  input.dataset.name = name;
  input.autocomplete = "off";
  input.spellcheck = false;
  return input;
}

function candidateRow(values) {
  const row = element("tr");
  rows += 1;
  row.append(element("th", String(rows)));
  for (const name of Object.keys(sample.candidates)) {
    const cell = element("td");
    const input = field(name, values[name]);
    input.setAttribute("aria-label", name + " of candidate " + rows);
    cell.append(input);
    row.append(cell);
  }
  const cell = element("td");
  const remove = element("button", "Remove", "small");
  remove.type = "button";
  remove.onclick = () => {
    row.remove();
    number();
  };
  cell.append(remove);
  row.append(cell);
  return row;
}

function number() {
  rows = 0;
  for (const row of byId("candidates").tBodies[0].rows) {
    rows += 1;
    row.cells[0].textContent = String(rows);
  }
}

function candidate(place) {
  const values = {};
  for (const [name, column] of Object.entries(sample.candidates)) values[name] = column[place];
  return values;
}

function fill() {
  const constant = byId("constant");
  constant.replaceChildren();
  for (const part of ["user", "context"]) {
    for (const [name, value] of Object.entries(sample[part])) {
      const label = element("label", name + " (" + part + ")");
      const input = field(name, value);
      input.dataset.part = part;
      label.append(input);
      constant.append(label);
    }
  }
  rows = 0;
  const table = byId("candidates");
  const head = element("tr");
  for (const name of ["", ...Object.keys(sample.candidates), ""]) head.append(element("th", name));
  const header = element("thead");
  header.append(head);
  const body = element("tbody");
  const count = Math.max(0, ...Object.values(sample.candidates).map((column) => column.length));
  for (let i = 0; i < count; i += 1) body.append(candidateRow(candidate(i)));
  table.replaceChildren(header, body);
}

function request() {
  const made = { model: sample.model, user: {}, context: {}, candidates: {}, by: byId("by").value, probabilities: true };
  for (const input of byId("constant").querySelectorAll("input")) {
    const part = input.dataset.part;
    const name = input.dataset.name;
    made[part][name] = read(name, input.value, kindOf([sample[part][name]]));
  }
  for (const name of Object.keys(sample.candidates)) made.candidates[name] = [];
  for (const input of byId("candidates").querySelectorAll("tbody input")) {
    const name = input.dataset.name;
    made.candidates[name].push(read(name, input.value, kindOf(sample.candidates[name])));
  }
  return made;
}

function label(asked, place) {
  for (const column of Object.values(asked.candidates)) {
    if (typeof column[place] === "string") return column[place];
  }
  return "";
}

const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);

function effect(group, value, largest) {
  const row = element("div", undefined, "effect");
  const name = element("span", group.name, "name");
  name.title = group.columns.join(", ") + " (" + group.source + ")";
  const bar = element("span", undefined, "bar");
  const part = element("i", undefined, value < 0 ? "down" : "up");
  part.style.width = (largest > 0 ? (50 * Math.abs(value)) / largest : 0) + "%";
  bar.append(part);
  row.append(name, bar, element("span", signed(value), "number"));
  return row;
}

function show(asked, answer) {
  const list = byId("ranking");
  list.replaceChildren();
  const largest = Math.max(0, ...answer.effects.flat().map(Math.abs));
  answer.ranking.forEach((place, i) => {
    const item = element("li");
    const head = element("div", undefined, "head");
    const score = element("span", answer.scores[i].toFixed(4), "score");
    const tasks = Object.entries(answer.probabilities).map(([task, found]) => task + " " + found[i].toFixed(4));
    if (tasks.length > 1) score.append(element("small", tasks.join(", ")));
    head.append(element("b", i + 1 + ". candidate " + (place + 1) + "  " + label(asked, place)), score);
    const effects = element("div", undefined, "effects");
    const order = answer.groups.map((_, g) => g);
    order.sort((a, b) => Math.abs(answer.effects[i][b]) - Math.abs(answer.effects[i][a]));
    for (const g of order.slice(0, 6)) effects.append(effect(answer.groups[g], answer.effects[i][g], largest));
    item.append(head, effects);
    if (order.length > 6) {
      const rest = element("details");
      const inside = element("div", undefined, "effects");
      for (const g of order.slice(6)) inside.append(effect(answer.groups[g], answer.effects[i][g], largest));
      rest.append(element("summary", order.length - 6 + " more"), inside);
      item.append(rest);
    }
    list.append(item);
  });
  byId("about").textContent =
    "Model " + answer.model + ", version " + answer.version + ". Bars show how far a group moved the score, up or down; those that moved it most come first.";
  const plain = { model: asked.model, user: asked.user, context: asked.context, candidates: asked.candidates };
  byId("command").textContent =
    "curl -s " + location.origin + "/v1/rank --json '" + JSON.stringify(plain).replaceAll("'", "'\\''") + "'";
  byId("answer").hidden = false;
}

async function choose(model) {
  sample = await call("/v1/sample?model=" + encodeURIComponent(model));
  fill();
}

async function start() {
  const index = await call("/v2/repository/index", {});
  const names = [...new Set(index.map((each) => each.name))];
  const select = byId("model");
  select.replaceChildren(...names.map((name) => element("option", name)));
  await choose(names[0]);
  byId("server").textContent = "Values are filled in from the server's sample request. Change them, and rank.";
  byId("request").hidden = false;
}

byId("model").onchange = (event) => {
  problem(null);
  choose(event.target.value).catch(problem);
};
byId("more").onclick = () => {
  const count = Object.values(sample.candidates)[0].length;
  byId("candidates").tBodies[0].append(candidateRow(candidate(rows % count)));
};
byId("request").onsubmit = async (event) => {
  event.preventDefault();
  problem(null);
  byId("rank").disabled = true;
  try {
    const asked = request();
    show(asked, await call("/v1/effects", asked));
  } catch (error) {
    problem(error);
  } finally {
    byId("rank").disabled = false;
  }
};

withToken(start);
