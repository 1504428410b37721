"use strict";
// The page that describes all calls: /openapi.json as a page.

const PREFIX = "#/components/schemas/";
let schemas = {};

const nameOf = (schema) => (schema.$ref ? schema.$ref.slice(PREFIX.length) : "");
const resolved = (schema) => (schema.$ref ? schemas[nameOf(schema)] || {} : schema);

function typeOf(schema) {
  if (schema.$ref) return nameOf(schema);
  const several = schema.anyOf || schema.oneOf;
  if (several) return several.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.type === "array") return "list of " + typeOf(schema.items || {});
  if (schema.type === "object" && schema.additionalProperties instanceof Object)
    return "object of " + typeOf(schema.additionalProperties);
  return schema.type || "any value";
}

// Names of the forms that a schema speaks of.
function inner(schema) {
  if (schema.$ref) return [nameOf(schema)];
  const parts = [...(schema.anyOf || schema.oneOf || []), schema.items, schema.additionalProperties];
  return parts.filter((part) => part instanceof Object).flatMap(inner);
}

function properties(schema, seen) {
  const list = element("ul", undefined, "schema");
  const required = new Set(schema.required || []);
  for (const [name, property] of Object.entries(schema.properties || {})) {
    const item = element("li");
    item.append(element("code", name), " ", element("span", typeOf(property), "type"));
    if (required.has(name)) item.append(element("b", " needed"));
    if (property.description) item.append(": " + property.description);
    for (const form of new Set(inner(property))) {
      if (!seen.has(form) && schemas[form]) item.append(properties(schemas[form], new Set([...seen, form])));
    }
    list.append(item);
  }
  return list;
}

function described(title, content) {
  const parts = [];
  for (const [kind, { schema }] of Object.entries(content || {})) {
    parts.push(element("h4", title + ", " + kind));
    if (!schema || schema.format === "binary") continue;
    const form = resolved(schema);
    if (form.description) parts.push(element("p", form.description));
    if (form.properties) parts.push(properties(form, new Set([nameOf(schema)])));
  }
  return parts;
}

function operation(method, path, facts) {
  const part = element("section", undefined, "call");
  const heading = element("h3");
  heading.append(element("span", method.toUpperCase(), "method"), path);
  part.append(heading, element("p", facts.summary || ""));
  if (facts.description) part.append(element("p", facts.description));
  if (facts.parameters && facts.parameters.length) {
    part.append(element("h4", "Parameters"));
    const list = element("ul", undefined, "schema");
    for (const each of facts.parameters) {
      const item = element("li");
      item.append(element("code", each.name), " ", element("span", typeOf(each.schema || {}) + ", in the " + each.in, "type"));
      if (each.required) item.append(element("b", " needed"));
      list.append(item);
    }
    part.append(list);
  }
  if (facts.requestBody) part.append(...described("Body", facts.requestBody.content));
  const answers = element("details");
  answers.append(element("summary", "Answers: " + Object.keys(facts.responses || {}).join(", ")));
  for (const [status, response] of Object.entries(facts.responses || {})) {
    answers.append(element("h4", status + " " + (response.description || "")));
    if (status === "200") answers.append(...described("Answer", response.content));
  }
  part.append(answers);
  return part;
}

async function start() {
  const api = await call("/openapi.json");
  schemas = (api.components || {}).schemas || {};
  byId("title").textContent = api.info.title + " " + api.info.version;
  byId("server").textContent = api.info.summary || "";
  const found = [];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, facts] of Object.entries(methods)) found.push(operation(method, path, facts));
  }
  byId("calls").replaceChildren(...found);
}

withToken(start);
