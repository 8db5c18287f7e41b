"use strict";

// The queries of the page. Texts of the data become text nodes, never markup.

const PAGE = 20;
const RIGHT = 0.5; // accuracy from which an answer counts as right
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const controls = byId("controls");
let page = 0;

for (const query of data.queries) {
  query.text = [query.id, query.question, ...query.answers].join("\n").toLowerCase();
}

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children.filter((child) => child !== null));
  return node;
}

function image(place, alt) {
  if (place === null) return null;
  const node = element("img", "");
  node.src = data.images[place];
  node.alt = alt;
  return node;
}

function readControls() {
  const form = new FormData(controls);
  return {
    words: form.get("search").toLowerCase().split(/\s+/).filter(Boolean),
    shots: Number(form.get("shots")),
    show: form.get("show"),
    a: Number(form.get("a")),
    b: Number(form.get("b")),
    methods: form.getAll("method").map(Number),
  };
}

function isRight([, , accuracy]) {
  return accuracy === null ? null : accuracy >= RIGHT;
}

function matches(query, wanted) {
  const picks = query.picks[wanted.shots];
  if (!picks.some(Boolean) || !wanted.words.every((word) => query.text.includes(word))) return false;
  if (wanted.show === "differ") {
    const answers = wanted.methods.filter((m) => picks[m]).map((m) => String(picks[m][1]).trim().toLowerCase());
    return new Set(answers).size > 1;
  }
  if (wanted.show === "versus") {
    const [a, b] = [picks[wanted.a], picks[wanted.b]];
    return Boolean(a && b) && isRight(a) === true && isRight(b) === false;
  }
  return true;
}

function verdict(pick) {
  const right = isRight(pick);
  if (right === null) return null;
  const partial = pick[2] > 0 && pick[2] < 1 ? ` ${pick[2].toFixed(2)}` : "";
  return element("span", `verdict ${right ? "good" : "bad"}`, (right ? "✓ right" : "✗ wrong") + partial);
}

function demonstration(place) {
  const [id, question, answer, picture] = data.demonstrations[place];
  const text = element("div", "", element("p", "", question), element("p", "answer", answer));
  const item = element("li", "", image(picture, `Image of demonstration ${id}`), text);
  item.title = `demonstration ${id}`;
  return item;
}

function methodRow(name, pick) {
  const [demonstrations, answer, , logProb] = pick;
  const result = element(
    "div",
    "result",
    element("h4", "", name),
    answer === null ? null : element("p", "answer", answer),
    verdict(pick),
    logProb === null ? null : element("small", "", ` log-prob ${logProb.toFixed(2)}`),
  );
  const prompt = demonstrations.length
    ? element("ol", "prompt", ...demonstrations.map(demonstration))
    : element("p", "about", "no demonstrations");
  return element("div", "method", result, prompt);
}

function card(query, wanted) {
  const picks = query.picks[wanted.shots];
  const truth = element("p", "truth", element("b", "", "Truth: "), query.answers.join(", "));
  const text = element("div", "", element("h3", "", query.question), truth, element("small", "", `query ${query.id}`));
  const head = element("div", "query", image(query.image, `Image of query ${query.id}`), text);
  const shown = wanted.methods.filter((m) => picks[m]);
  return element("article", "card", head, ...shown.map((m) => methodRow(data.methods[m], picks[m])));
}

function show() {
  const wanted = readControls();
  byId("versus").hidden = wanted.show !== "versus";
  const found = data.queries.filter((query) => matches(query, wanted));
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const start = page * PAGE;
  const shown = found.slice(start, start + PAGE);
  byId("cards").replaceChildren(...shown.map((query) => card(query, wanted)));
  const range = found.length ? `, ${start + 1} to ${start + shown.length} shown` : "";
  byId("status").textContent = `${found.length} of ${data.queries.length} queries${range}`;
  byId("page").textContent = `page ${page + 1} of ${pages}`;
  byId("previous").disabled = page === 0;
  byId("next").disabled = page >= pages - 1;
}

function turn(by) {
  page += by;
  show();
  byId("status").scrollIntoView();
}

controls.addEventListener("input", () => {
  page = 0;
  show();
});
controls.addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
show();
