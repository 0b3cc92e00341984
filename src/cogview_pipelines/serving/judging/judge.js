// The page for judges. It knows pictures by their places only: who made which is known to the server alone.
"use strict";

const token = location.pathname.split("/").filter(Boolean).pop();
const base = `../v1/judging/${encodeURIComponent(token)}`;
const find = (id) => document.getElementById(id);
let study = null;
let task = null;
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");

function text(key, values = {}) {
  let found = study.texts[key][language];
  for (const [name, value] of Object.entries(values)) found = found.replace(`{${name}}`, value);
  return found;
}

function element(name, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
}

async function ask(path, options = {}) {
  const response = await fetch(base + path, { ...options, cache: "no-store" });
  if (!response.ok) throw new Error(`${response.status}`);
  return response.json();
}

// A row of radio buttons for the grades of one picture
function question(place, name, most) {
  const set = element("fieldset", { className: name });
  set.dataset.question = `${name}-${place}`;
  const legend = element("legend");
  legend.dataset.label = name;
  legend.dataset.most = most;
  set.append(legend);
  for (let grade = 1; grade <= most; grade++) {
    const radio = element("input", { type: "radio", name: `${name}-${place}`, value: grade });
    set.append(element("label", {}, radio, `${grade}`));
  }
  return set;
}

function figure(url, place) {
  const letter = String.fromCharCode(65 + place);
  const image = element("img", { src: url });
  image.dataset.letter = letter;
  image.addEventListener("error", () => { find("problem").textContent = text("no_picture"); });
  const made = element("figure", { className: "picture" }, element("strong", { textContent: letter }), image);
  if (study.mode === "grades") {
    for (const [name, most] of Object.entries(study.grades)) made.append(question(place, name, most));
  }
  const best = element("fieldset", { className: "best" });
  best.dataset.question = "best";
  const words = element("span");
  words.dataset.label = study.mode === "ab" ? "best_ab" : "best";
  best.append(element("label", {}, element("input", { type: "radio", name: "best", value: place }), words));
  made.append(best);
  return made;
}

function showTexts() {
  document.documentElement.lang = language;
  document.title = text("title");
  for (const one of document.querySelectorAll("[data-text]")) one.textContent = text(one.dataset.text);
  for (const one of document.querySelectorAll("[data-label]")) {
    one.textContent = text(one.dataset.label);
    if (one.dataset.most) {
      one.append(" ", element("small", { textContent: `(${text("from_to", { most: one.dataset.most })})` }));
    }
  }
  for (const one of document.querySelectorAll("[data-letter]")) one.alt = `${text("picture")} ${one.dataset.letter}`;
  for (const one of document.querySelectorAll("[data-language]")) {
    one.setAttribute("aria-pressed", `${one.dataset.language === language}`);
  }
  find("hint").textContent = task ? text(study.mode === "ab" ? "hint_ab" : "hint") : "";
  find("progress").textContent = text("progress", { done: study.answered, count: study.count });
}

// `null` is the end of the list
async function show(place) {
  task = place === null ? null : await ask(`/tasks/${place}`);
  find("answer").hidden = task === null;
  find("done").hidden = task !== null;
  find("problem").textContent = "";
  find("caption").textContent = task ? task.caption : "";
  find("pictures").replaceChildren(...(task ? task.pictures.map((name, index) => figure(`../${name}`, index)) : []));
  find("back").disabled = place === 0;
  if (task && task.answer) {
    const chosen = { best: task.answer.best };
    (task.answer.grades || []).forEach((grades, index) => {
      for (const [name, grade] of Object.entries(grades)) chosen[`${name}-${index}`] = grade;
    });
    for (const [name, value] of Object.entries(chosen)) {
      document.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
    }
  }
  showTexts();
  window.scrollTo(0, 0);
}

function read() {
  const form = new FormData(find("answer"));
  const missing = [...document.querySelectorAll("[data-question]")].filter((set) => !form.has(set.dataset.question));
  for (const set of document.querySelectorAll("fieldset")) set.classList.toggle("missing", missing.includes(set));
  if (missing.length) {
    find("problem").textContent = text("missing") + " " + text(missing[0].querySelector("[data-label]").dataset.label);
    missing[0].querySelector("input").focus();
    return null;
  }
  const answer = { best: Number(form.get("best")) };
  if (study.mode === "grades") {
    answer.grades = task.pictures.map((_, index) => Object.fromEntries(
      Object.keys(study.grades).map((name) => [name, Number(form.get(`${name}-${index}`))]),
    ));
  }
  return answer;
}

find("answer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = read();
  if (answer === null || find("send").disabled) return;
  find("send").disabled = true;
  try {
    const body = JSON.stringify(answer);
    const headers = { "Content-Type": "application/json" };
    const state = await ask(`/tasks/${task.place}`, { method: "PUT", body, headers });
    study.answered = state.answered;
    await show(state.next);
  } catch (error) {
    find("problem").textContent = text("failed");
  } finally {
    find("send").disabled = false;
  }
});

find("back").addEventListener("click", () => show(task.place - 1));
for (const button of document.querySelectorAll("[data-language]")) {
  button.addEventListener("click", () => {
    language = button.dataset.language;
    localStorage.setItem("language", language);
    showTexts();
  });
}

ask("").then((found) => { study = found; return show(study.next); });
