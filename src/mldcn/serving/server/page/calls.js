"use strict";
// What both pages need: elements, and calls to the server. Texts go in as texts, never as HTML.

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const byId = (id) => document.getElementById(id);

// The token stays in this page's memory.
let token = "";

async function call(path, body) {
  const headers = {};
  if (token) headers.Authorization = "Bearer " + token;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    credentials: "omit",
  });
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) {
    const error = new Error(answer.error || "the server answered " + response.status);
    error.status = response.status;
    throw error;
  }
  return answer;
}

function problem(error) {
  const place = byId("problem");
  place.textContent = error ? error.message : "";
  place.hidden = !error;
}

// Runs ``work``; where the server wants a token, asks for it and runs it again.
async function withToken(work) {
  const login = byId("login");
  try {
    await work();
    login.hidden = true;
  } catch (error) {
    if (error.status !== 401) return problem(error);
    login.hidden = false;
    problem(token ? error : null);
    login.onsubmit = (event) => {
      event.preventDefault();
      token = byId("token").value.trim();
      problem(null);
      withToken(work);
    };
  }
}
