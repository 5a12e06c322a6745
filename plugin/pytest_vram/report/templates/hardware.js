"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = Object.fromEntries(data.columns.map((name, index) => [name, index]));
  const $ = (id) => document.getElementById(id);
  const controls = { model: $("model"), card: $("card"), memory: $("memory"), best: $("best") };
  const body = $("rows"), table = body.closest("table"), count = $("count"), more = $("more"), heads = [...document.querySelectorAll("th[data-key]")];
  const words = Object.fromEntries(data.words.map(([key, kind, word]) => [key, [word, kind]]));
  const rank = data.words.map((entry) => entry[0]).join(""), step = 200;
  let sort = { key: null, down: false }, shown = step;

  for (const name of new Set(data.rows.map((row) => row[at.model]))) controls.model.append(new Option(name, name));
  for (const [name, gib] of data.cards) controls.card.append(new Option(`${name} (${gib.toFixed(2)} GiB)`, name));

  const letter = (row, card) => row[at.verdicts][card[2]];
  const number = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const seconds = (value) => number(value, value < 10 ? 3 : 1);
  const signed = (value) => (value === null ? "–" : (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(2));

  function value(row, key, card) {
    if (key === "verdict") return card ? rank.indexOf(letter(row, card).toLowerCase()) : null;
    return row[at[key === "size" ? "pixels" : key]];
  }

  function chosen() {
    const card = data.cards.find((entry) => entry[0] === controls.card.value);
    const limit = parseFloat(controls.memory.value);
    const rows = data.rows.filter((row) =>
      (!controls.model.value || row[at.model] === controls.model.value) &&
      (Number.isNaN(limit) || (row[at.required] !== null && row[at.required] <= limit)) &&
      (!controls.best.checked || !card || letter(row, card) !== letter(row, card).toLowerCase()));
    if (sort.key) {
      const compare = (a, b) => (a === b ? 0 : a === null ? 1 : b === null ? -1
        : (sort.down ? -1 : 1) * (typeof a === "number" ? a - b : a < b ? -1 : 1));
      rows.sort((a, b) => compare(value(a, sort.key, card), value(b, sort.key, card)));
    }
    return [rows, card];
  }

  function cell(row, text, kind, tag = "td") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (kind) made.className = kind;
    row.append(made);
    return made;
  }

  function render() {
    const [rows, card] = chosen();
    controls.best.disabled = !card;
    table.classList.toggle("no-card", !card);
    const made = rows.slice(0, shown).map((row) => {
      const line = document.createElement("tr"), guess = row[at.estimated] ? " estimated" : "";
      const first = cell(line, row[at.model], "first", "th");
      first.scope = "row";
      cell(line, row[at.size]);
      cell(line, row[at.batch] ?? "–", "n");
      const verdict = cell(line, "", "verdict");
      if (card) {
        const [word, kind] = words[letter(row, card).toLowerCase()];
        const mark = document.createElement("span");
        mark.className = "v " + kind + guess;
        mark.textContent = (guess ? "~" : "") + word;
        verdict.append(mark);
      }
      const required = row[at.remark].endsWith("out of memory") ? "> " : guess ? "~" : "";
      cell(line, required + number(row[at.required], 2), "n" + guess);
      const set = cell(line, "", "set");
      const name = document.createElement("code");
      for (const part of row[at.set].split(/(?<=[+_])/)) name.append(part, document.createElement("wbr"));
      set.append(name, row[at.remark] ? ` (${row[at.remark]})` : "");
      cell(line, seconds(row[at.seconds]), "n");
      cell(line, signed(row[at.saved]), "n more");
      cell(line, signed(row[at.paid]), "n more");
      cell(line, row[at.frontier] ? "●" : "", "more");
      cell(line, number(row[at.shown], 2), "n more");
      cell(line, row[at.slowdown] === null ? "–" : "×" + number(row[at.slowdown], 2), "n more");
      cell(line, number(row[at.host], 2), "n more");
      cell(line, number(row[at.disk], 2), "n more");
      const runs = cell(line, "", "runs");
      for (const tag of row[at.runs].split(" ")) {
        const link = document.createElement("a");
        link.href = "#" + tag;
        link.textContent = tag;
        runs.append(link, " ");
      }
      return line;
    });
    body.replaceChildren(...made);
    count.textContent = `${rows.length} of ${data.rows.length} cases` + (made.length < rows.length ? `, ${made.length} shown` : "");
    more.hidden = made.length === rows.length;
    for (const head of heads) {
      const sorted = head.dataset.key === sort.key;
      head.setAttribute("aria-sort", sorted ? (sort.down ? "descending" : "ascending") : "none");
    }
  }

  function remember() {
    const state = new URLSearchParams();
    for (const key of ["model", "card", "memory"]) if (controls[key].value) state.set(key, controls[key].value);
    if (!controls.best.checked) state.set("all", "1");
    if (sort.key) state.set("sort", (sort.down ? "-" : "") + sort.key);
    try { history.replaceState(null, "", "#" + state); } catch { /* a page without a place of its own keeps no state */ }
  }

  function restore() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const key of ["model", "card"])
      if ([...controls[key].options].some((option) => option.value === state.get(key))) controls[key].value = state.get(key);
    if (Number.isFinite(parseFloat(state.get("memory")))) controls.memory.value = parseFloat(state.get("memory"));
    controls.best.checked = !state.has("all");
    const key = state.get("sort");
    if (key && heads.some((head) => head.dataset.key === key.replace("-", "")))
      sort = { key: key.replace("-", ""), down: key.startsWith("-") };
  }

  const changed = () => { shown = step; render(); remember(); };
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const control of Object.values(controls)) for (const event of ["input", "change"]) control.addEventListener(event, changed);
  for (const head of heads) head.querySelector("button").addEventListener("click", () => {
    const key = head.dataset.key;
    sort = sort.key === key ? { key, down: !sort.down } : { key, down: false };
    changed();
  });
  body.addEventListener("click", (event) => {  // to the run, and the address keeps what was chosen
    const run = event.target.closest("a") && document.getElementById(event.target.hash.slice(1));
    if (!run) return;
    event.preventDefault();
    run.tabIndex = -1;
    run.focus();
  });
  more.addEventListener("click", () => { shown += step; render(); });
  $("reset").addEventListener("click", () => {
    controls.model.value = controls.card.value = controls.memory.value = "";
    controls.best.checked = true;
    sort = { key: null, down: false };
    changed();
  });
  addEventListener("beforeprint", () => { shown = Infinity; render(); });
  restore();
  render();
})();
