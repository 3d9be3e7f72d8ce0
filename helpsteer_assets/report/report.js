"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("scripted");
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  /* An element with properties and children; strings become text, never markup. */
  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name.includes("-") || name === "role") element.setAttribute(name, value);
      else element[name] = value;
    }
    element.append(...children);
    return element;
  };

  /* ---- light and dark ---- */
  const THEME = "helpsteer-report-theme";
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const nameTheme = () => {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", `Change to ${isDark() ? "light" : "dark"} colours`);
  };
  try {
    const kept = sessionStorage.getItem(THEME);
    if (kept) root.dataset.theme = kept;
  } catch { /* A page without storage starts as the system says. */ }
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { sessionStorage.setItem(THEME, root.dataset.theme); } catch { /* As above. */ }
    nameTheme();
  });
  prefersDark.addEventListener("change", nameTheme);
  nameTheme();

  /* ---- what a point shows ---- */
  const tip = byId("tip");
  const hideTip = () => { tip.hidden = true; };
  const showTip = (point) => {
    tip.replaceChildren(make("b", {}, point.dataset.policy));
    for (const line of point.dataset.details.split("; ")) tip.append(make("span", {}, line));
    tip.hidden = false;
    const marker = (point.querySelector("use") || point).getBoundingClientRect();
    const size = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, marker.x + marker.width / 2 - size.width / 2), innerWidth - size.width - 8);
    const above = marker.y - size.height - 10;
    tip.style.transform = `translate(${left}px, ${above > 60 ? above : marker.bottom + 10}px)`;
  };
  for (const point of all(".point")) {
    point.addEventListener("pointerenter", () => showTip(point));
    point.addEventListener("pointerleave", hideTip);
    point.addEventListener("focus", () => showTip(point));
    point.addEventListener("blur", hideTip);
  }
  addEventListener("scroll", hideTip, { passive: true });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  /* ---- tables ---- */
  const scoreTable = byId("score-table");
  const cellValue = (cell, key) => {
    const text = cell.dataset[key] ?? cell.dataset.value ?? cell.textContent.trim();
    if (text === "") return null;
    return Number.isNaN(Number(text)) ? text : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  const sortTable = (table, header, direction) => {
    const column = header.cellIndex;
    const key = table.classList.contains("show-delta") ? "delta" : "mean";
    const sign = direction === "ascending" ? 1 : -1;
    const rows = all("tbody > tr", table).map((row) => [cellValue(row.cells[column], key), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
    for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", other === header ? direction : "none");
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  for (const button of all(".sort")) {
    const header = button.closest("th");
    button.addEventListener("click", () => {
      const first = button.classList.contains("number") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      sortTable(button.closest("table"), header, header.getAttribute("aria-sort") === first ? other : first);
    });
  }
  for (const input of all("input[name=values]")) {
    input.addEventListener("change", () => {
      scoreTable.className = `sortable show-${input.value}`;
      const header = scoreTable.querySelector("[aria-sort$=cending]");
      if (header) sortTable(scoreTable, header, header.getAttribute("aria-sort"));
    });
  }
  for (const input of all("input[name=group]")) {
    input.addEventListener("change", () => {
      for (const cell of all(`.role-${input.value}`, scoreTable)) cell.hidden = !input.checked;
    });
  }

  /* ---- words that differ ---- */
  const ALONE = "[\\p{Script=Han}\\p{Script=Hiragana}\\p{Script=Katakana}\\p{Script=Thai}]";
  const WORD = new RegExp(`${ALONE}|(?:(?!${ALONE})[\\p{L}\\p{N}\\p{M}_'’-])+|[^\\s]`, "gu");
  /* Words and signs of a text with their places: scripts without spaces go letter by letter. */
  const words = (text) => [...text.matchAll(WORD)].map((found) => ({ word: found[0], start: found.index, end: found.index + found[0].length }));
  const MOST_EDITS = 1500;

  /* Which words of a and of b belong to a longest common subsequence (Myers 1986, greedy); null beyond MOST_EDITS. */
  const commonWords = (a, b) => {
    const numbers = new Map();
    const numbered = (list) => Int32Array.from(list, ({ word }) => {
      if (!numbers.has(word)) numbers.set(word, numbers.size);
      return numbers.get(word);
    });
    const x = numbered(a), y = numbered(b);
    const inA = new Uint8Array(x.length), inB = new Uint8Array(y.length);
    let start = 0, endX = x.length, endY = y.length;
    while (start < endX && start < endY && x[start] === y[start]) { inA[start] = inB[start] = 1; start += 1; }
    while (endX > start && endY > start && x[endX - 1] === y[endY - 1]) { endX -= 1; endY -= 1; inA[endX] = inB[endY] = 1; }
    const n = endX - start, m = endY - start;
    const middle = MOST_EDITS + 1;
    const furthest = new Int32Array(2 * middle + 1);
    const trace = [];
    for (let d = 0; d <= Math.min(n + m, MOST_EDITS); d += 1) {
      trace.push(furthest.slice(middle - d, middle + d + 1));
      for (let k = -d; k <= d; k += 2) {
        const down = k === -d || (k !== d && furthest[middle + k - 1] < furthest[middle + k + 1]);
        let i = down ? furthest[middle + k + 1] : furthest[middle + k - 1] + 1;
        let j = i - k;
        while (i < n && j < m && x[start + i] === y[start + j]) { i += 1; j += 1; }
        furthest[middle + k] = i;
        if (i >= n && j >= m) {
          for (let back = d, kk = k; back >= 0; back -= 1) {
            const before = trace[back];
            const at = (diagonal) => before[diagonal + back];
            const fromDown = kk === -back || (kk !== back && at(kk - 1) < at(kk + 1));
            const previous = fromDown ? kk + 1 : kk - 1;
            const fromI = back === 0 ? 0 : at(previous), fromJ = back === 0 ? 0 : fromI - previous;
            while (i > fromI && j > fromJ) { i -= 1; j -= 1; inA[start + i] = inB[start + j] = 1; }
            i = fromI; j = fromJ; kk = previous;
          }
          return { inA, inB };
        }
      }
    }
    return null;
  };
  /* One or two common words inside a rewritten passage are chance: marked with it, the passage can be read. */
  const withoutChance = ({ inA, inB }) => {
    const runs = [];
    for (let i = 0, j = 0; i < inA.length || j < inB.length;) {
      const fromI = i, fromJ = j;
      while (i < inA.length && !inA[i]) i += 1;
      while (j < inB.length && !inB[j]) j += 1;
      const edited = Math.max(i - fromI, j - fromJ), commonI = i, commonJ = j;
      while (i < inA.length && j < inB.length && inA[i] && inB[j]) { i += 1; j += 1; }
      runs.push({ edited, commonI, commonJ, length: i - commonI });
    }
    runs.forEach(({ edited, commonI, commonJ, length }, n) => {
      const next = runs[n + 1];
      if (length <= 2 && edited >= 3 && next && next.edited >= 3) {
        inA.fill(0, commonI, commonI + length);
        inB.fill(0, commonJ, commonJ + length);
      }
    });
    return { inA, inB };
  };
  /* For texts too different: a word of one counts as common if the other has it anywhere. */
  const sharedWords = (a, b) => {
    const ofA = new Set(a.map(({ word }) => word)), ofB = new Set(b.map(({ word }) => word));
    return { inA: Uint8Array.from(a, ({ word }) => ofB.has(word)), inB: Uint8Array.from(b, ({ word }) => ofA.has(word)) };
  };
  const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (sign) => String.fromCharCode(0x2400 + sign.charCodeAt(0)));
  /* `text` with its words marked that `reference` does not have, and with those it lacks; false where too different. */
  const markedText = (reference, text, showAdded, showRemoved) => {
    const a = words(reference), b = words(text);
    const exact = commonWords(a, b);
    const { inA, inB } = exact ? withoutChance(exact) : sharedWords(a, b);
    const parts = document.createDocumentFragment();
    let i = 0, j = 0, written = 0;
    while (i < a.length || j < b.length) {
      const missing = i;
      while (i < a.length && !inA[i]) i += 1;
      if (exact && showRemoved && i > missing) {
        const gap = text.slice(written, j < b.length ? b[j].start : text.length);
        const run = make("del", {}, visible(reference.slice(a[missing].start, a[i - 1].end)));
        parts.append(visible(gap), ...(gap === "" || /\s$/.test(gap) ? [run, " "] : [" ", run]));
        written += gap.length;
      }
      const added = j;
      while (j < b.length && !inB[j]) j += 1;
      if (j > added) {
        parts.append(visible(text.slice(written, b[added].start)));
        const run = visible(text.slice(b[added].start, b[j - 1].end));
        parts.append(showAdded ? make("ins", {}, run) : run);
        written = b[j - 1].end;
      }
      /* Without an exact alignment the common words of a say nothing about places in b. */
      if (exact) while (i < a.length && j < b.length && inA[i] && inB[j]) { i += 1; j += 1; }
      else { i = a.length; while (j < b.length && inB[j]) j += 1; }
    }
    parts.append(visible(text.slice(written)));
    return { parts, exact: exact !== null };
  };

  /* ---- responses ---- */
  const data = JSON.parse(byId("data").textContent);
  const list = byId("prompts");
  if (!list) return;
  const prompts = data.prompts.map(([id, prompt, truncated, responses]) => ({
    id, prompt, truncated,
    responses: responses.map(([text, capped, tokens, count, disagreement, scores]) => ({ text, capped, tokens, count, disagreement, scores })),
  }));
  const everyone = data.policies.map((_, number) => number);
  const filters = all("input[name=filter]");
  const boxes = all("input[name=policy]");
  const search = byId("search"), reference = byId("reference");
  const state = { prompt: prompts[0].id, filter: "all", q: "", shown: new Set(everyone), reference: 0 };
  let listed = [];

  const bags = new Map();
  const bag = (text) => {
    if (!bags.has(text)) {
      const counts = new Map();
      for (const { word } of words(text)) counts.set(word, (counts.get(word) || 0) + 1);
      bags.set(text, counts);
    }
    return bags.get(text);
  };
  const size = (counts) => [...counts.values()].reduce((sum, count) => sum + count, 0);
  /* Share of the words of two texts that they do not have in common, 0 to 1. */
  const changed = (text, other) => {
    if (text === other) return 0;
    const a = bag(text), b = bag(other);
    let common = 0;
    for (const [word, count] of a) common += Math.min(count, b.get(word) || 0);
    const total = size(a) + size(b);
    return total === 0 ? 0 : 1 - 2 * common / total;
  };
  const shownResponses = (prompt) => prompt.responses.filter((_, number) => state.shown.has(number));
  /* A filter says how strongly a prompt belongs to it (0: not), and what its row says of that. */
  const FILTERS = {
    all: { measure: () => 1, says: () => "", sorted: false },
    capped: {
      measure: (prompt) => shownResponses(prompt).filter((response) => response.capped).length,
      says: (count) => `${count} cut at the limit`, sorted: false,
    },
    changed: {
      measure: (prompt) => Math.max(0, ...shownResponses(prompt).map((response) => changed(response.text, prompt.responses[state.reference].text))),
      says: (share) => `${Math.round(100 * share)}% of words differ`, sorted: true,
    },
    disagreement: {
      measure: (prompt) => Math.max(0, ...shownResponses(prompt).map((response) => response.disagreement || 0)),
      says: (strength) => `disagreement ${Number(strength.toPrecision(2))}`, sorted: true,
    },
  };
  const matching = (name) => {
    const { measure, sorted } = FILTERS[name];
    const rows = prompts.map((prompt) => ({ prompt, strength: measure(prompt) })).filter(({ strength }) => strength > 0);
    return sorted ? rows.sort((a, b) => b.strength - a.strength) : rows;
  };
  let lowered = null;
  const matchesSearch = (prompt) => {
    if (!state.q) return true;
    lowered ??= new Map(prompts.map((p) => [p, [p.id, p.prompt, ...p.responses.map((r) => r.text)].join("\n").toLowerCase()]));
    return lowered.get(prompt).includes(state.q.toLowerCase());
  };
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    const text = Number.isInteger(value) ? String(value) : Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(2);
    return text.replace("-", "\u2212");
  };
  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  const chosen = () => listed.findIndex(({ prompt }) => prompt.id === state.prompt);
  const saveState = () => {
    const parts = new URLSearchParams({ prompt: state.prompt, filter: state.filter });
    if (state.q) parts.set("q", state.q);
    if (state.shown.size < everyone.length) parts.set("policies", [...state.shown].sort((a, b) => a - b).map((n) => data.policies[n]).join(","));
    if (state.reference) parts.set("reference", data.policies[state.reference]);
    try { history.replaceState(null, "", `#${parts}`); } catch { /* Some viewers keep pages from changing their address. */ }
  };
  const readState = () => {
    const parts = new URLSearchParams(location.hash.slice(1));
    if (!location.hash.includes("=")) return false;
    state.filter = Object.hasOwn(FILTERS, parts.get("filter") ?? "") ? parts.get("filter") : "all";
    state.q = parts.get("q") ?? "";
    const shown = (parts.get("policies") ?? "").split(",").map((label) => data.policies.indexOf(label)).filter((n) => n >= 0);
    state.shown = new Set(shown.length ? shown : everyone);
    state.reference = Math.max(0, data.policies.indexOf(parts.get("reference") ?? ""));
    const wanted = prompts.find(({ id }) => id === parts.get("prompt"));
    if (wanted) {
      state.prompt = wanted.id;
      /* A link to a prompt shows it, whatever else it says. */
      if (!matching(state.filter).some(({ prompt }) => prompt === wanted)) state.filter = "all";
      if (!matchesSearch(wanted)) state.q = "";
    }
    return true;
  };

  const showList = () => {
    for (const input of filters) {
      const count = input.value === "changed"
        ? prompts.filter((p) => shownResponses(p).some((r) => r.text !== p.responses[state.reference].text)).length
        : matching(input.value).length;
      input.parentElement.querySelector(".count").textContent = `(${count})`;
      input.checked = input.value === state.filter;
    }
    for (const box of boxes) {
      box.checked = state.shown.has(Number(box.value));
      box.disabled = box.checked && state.shown.size === 1;
    }
    reference.value = String(state.reference);
    if (search.value !== state.q) search.value = state.q;
    listed = matching(state.filter).filter(({ prompt }) => matchesSearch(prompt));
    if (listed.length && chosen() < 0) state.prompt = listed[0].prompt.id;
    const options = document.createDocumentFragment();
    listed.forEach(({ prompt, strength }, position) => {
      const option = make("div", { className: "option", id: `option-${position}`, role: "option", "aria-selected": "false" });
      option.append(make("span", { dir: "auto" }, visible(prompt.prompt.slice(0, 160)) || "(empty prompt)"));
      const says = FILTERS[state.filter].says(strength);
      if (says) option.append(make("small", {}, says));
      option.addEventListener("click", () => choose(position));
      options.append(option);
    });
    list.replaceChildren(options);
    byId("found").textContent = listed.length ? `${listed.length} of ${prompts.length} prompts` : "No prompt matches; change the search or the filter.";
    showPrompt();
  };

  const scoreRows = (response, compared) => {
    const body = make("tbody");
    data.measures.forEach(({ title }, m) => {
      const value = response.scores[m];
      if (value === null || value === undefined) return;
      const other = compared && compared.scores[m];
      const difference = compared && other !== null && other !== undefined ? signed(value - other) : "";
      body.append(make("tr", {}, make("th", { scope: "row" }, title), make("td", { className: "number" }, number(value)),
        make("td", { className: "number", title: compared ? `difference to ${data.policies[state.reference]}` : "" }, difference)));
    });
    if (!body.rows.length) return "";
    return make("table", {}, compared ? make("caption", {}, `difference to ${data.policies[state.reference]} on the right`) : "", body);
  };
  const responseCard = (prompt, policy) => {
    const response = prompt.responses[policy], compared = policy === state.reference ? null : prompt.responses[state.reference];
    const card = make("article", { className: `response p${policy}`, "aria-label": data.policies[policy] });
    const name = make("span", { className: "policy" }, make("span", { className: policy === 0 && data.policies[0] === "SFT" ? "swatch sft" : "swatch" }), data.policies[policy]);
    card.append(make("h4", {}, name, make("small", {}, `${number(response.tokens)} tokens, ${number(response.count)} words`)));
    const flags = make("p", { className: "flags" });
    if (response.capped) flags.append(make("span", { className: "flag" }, "cut at the length limit"));
    if (response.disagreement > 0) flags.append(make("span", { className: "flag" }, "rater and margin disagree"));
    const text = make("p", { className: "text", dir: "auto" });
    if (!response.text.trim()) text.append(make("span", { className: "empty" }, response.text ? "(only white space)" : "(empty response)"));
    if (compared && (byId("added").checked || byId("removed").checked)) {
      const { parts, exact } = markedText(compared.text, response.text, byId("added").checked, byId("removed").checked);
      text.append(parts);
      if (!exact) flags.append(make("span", { className: "flag" }, `very different: words that ${data.policies[state.reference]} never uses are marked`));
    } else text.append(visible(response.text));
    if (flags.childElementCount) card.append(flags);
    card.append(text, scoreRows(response, compared));
    return card;
  };
  const showPrompt = () => {
    const position = chosen();
    const place = byId("prompt"), responses = byId("responses");
    all("[aria-selected=true]", list).forEach((option) => option.setAttribute("aria-selected", "false"));
    byId("previous").disabled = position <= 0;
    byId("next").disabled = position < 0 || position === listed.length - 1;
    byId("position").textContent = position < 0 ? "" : `${position + 1} of ${listed.length}`;
    place.hidden = position < 0;
    list.removeAttribute("aria-activedescendant");
    if (position < 0) { responses.replaceChildren(); return; }
    const { prompt } = listed[position];
    const option = list.children[position];
    option.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", option.id);
    const top = option.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + option.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
    const heading = make("h3", {}, make("span", {}, `Prompt ${visible(prompt.id)}`));
    if (prompt.truncated) heading.append(make("span", { className: "flag" }, "the models saw only its end"));
    place.replaceChildren(heading, make("p", { className: "text", dir: "auto" }, visible(prompt.prompt)));
    responses.replaceChildren(...[...state.shown].sort((a, b) => a - b).map((policy) => responseCard(prompt, policy)));
    /* What scrolls can be scrolled by keyboard. */
    for (const text of all(".text", byId("browser"))) if (text.scrollHeight > text.clientHeight) text.tabIndex = 0;
  };
  const choose = (position) => {
    if (!listed.length) return;
    state.prompt = listed[Math.min(Math.max(position, 0), listed.length - 1)].prompt.id;
    showPrompt();
    saveState();
  };
  const change = () => { showList(); saveState(); };

  byId("previous").addEventListener("click", () => choose(chosen() - 1));
  byId("next").addEventListener("click", () => choose(chosen() + 1));
  list.addEventListener("keydown", (event) => {
    const target = { ArrowDown: chosen() + 1, ArrowUp: chosen() - 1, PageDown: chosen() + 10, PageUp: chosen() - 10, Home: 0, End: listed.length - 1 }[event.key];
    if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(target);
  });
  byId("browser").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    event.preventDefault();
    choose(chosen() + step);
  });
  for (const input of filters) input.addEventListener("change", () => { state.filter = input.value; change(); });
  for (const box of boxes) {
    box.addEventListener("change", () => {
      if (box.checked) state.shown.add(Number(box.value));
      else state.shown.delete(Number(box.value));
      change();
    });
  }
  reference.addEventListener("change", () => { state.reference = Number(reference.value); change(); });
  search.addEventListener("input", () => { state.q = search.value; change(); });
  for (const id of ["added", "removed"]) byId(id).addEventListener("change", showPrompt);
  for (const link of all(".read")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      state.shown = new Set([0, Number(link.dataset.policies)]);
      change();
      byId("browser").scrollIntoView();
      list.focus({ preventScroll: true });
    });
  }
  addEventListener("hashchange", () => { if (readState()) showList(); });
  const linked = readState();
  showList();
  if (linked) byId("browser").scrollIntoView({ behavior: "instant" });
})();
