"use strict";
// Everything that comes from outside becomes text (textContent), never HTML.
const POLL_SECONDS = 2, RATE_POLLS = 5, CURVE_POLLS = 60, PATIENCE_SECONDS = 10;
const MOST_CHOSEN = 5;  // a browser opens six connections to a server (HTTP/1.1), and poll() needs one
const at = (id) => document.getElementById(id);
const plain = new Intl.NumberFormat("en"), short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const number = { format: (value) => (value < 1e6 ? plain : short).format(value) };
const chosen = new Map();  // the tenant's name, or "" for the base model: the name that the API takes
let key = sessionStorage.getItem("para_jax key") || "";
let states = [], curve = [], first = true, base = "", running = null, timer = 0, polls = 0;

function made(tag, text, ...names) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  element.classList.add(...names);
  return element;
}

function show(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

// -------------------------------------------------------------------------------------------------- the server's state

function headers() {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

async function poll() {
  clearTimeout(timer);
  const search = at("search").value, mine = ++polls, late = () => mine !== polls;
  try {
    const response = await fetch(`page/state?search=${encodeURIComponent(search)}`, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(1000 * PATIENCE_SECONDS) });
    const problem = response.ok ? "" : await errorOf(response), state = response.ok ? await response.json() : null;
    if (late()) return;
    if (response.status === 401) return askForKey(problem);
    if (problem) throw new Error(problem);
    showState(state);
    link("up", "live");
  } catch (error) {
    if (late()) return;
    const silent = error instanceof TypeError || error.name === "TimeoutError";
    link("down", silent ? "the server does not answer" : error.message);
  }
  if (!document.hidden) timer = setTimeout(poll, 1000 * POLL_SECONDS);
}

function link(name, text) {
  at("link").className = name;
  at("link").textContent = text;
}

function askForKey(problem) {
  at("key-form").hidden = false;
  at("work").hidden = at("totals").hidden = true;
  show(at("key-error"), key ? problem : "");
  link("", "needs an API key");
  at("key").focus();
}

function showState(state) {
  base = state.base;
  states = [...states, state].slice(-RATE_POLLS);
  at("key-form").hidden = true;
  at("work").hidden = false;
  at("base").textContent = base;
  at("totals").hidden = !state.engine;
  if (state.engine) showEngine(state.engine);
  if (first) {
    state.rows.slice(0, 3).forEach((row) => chosen.set(row.name ?? "", row.name ?? base));
    first = false;
    showChosen();
  }
  showRows(state);
}

function rate(take) {
  const earlier = states.find((state) => take(state) !== undefined), last = states[states.length - 1];
  const seconds = last.time - earlier.time;
  return seconds > 0 ? Math.max(0, take(last) - take(earlier)) / seconds : 0;
}

function rounded(value) {
  return number.format(value < 10 ? Math.round(10 * value) / 10 : Math.round(value));
}

function showEngine(engine) {
  const now = rate((state) => state.engine?.new_tokens);
  curve = [...curve, now].slice(-CURVE_POLLS);
  at("rate").textContent = rounded(now);
  const most = Math.max(...curve, 1e-9);
  const points = curve.map((value, i) => `${100 - (100 * (curve.length - 1 - i)) / (CURVE_POLLS - 1)},${96 - (88 * value) / most}`);
  at("curve").querySelector("polyline").setAttribute("points", points.join(" "));
  const left = 100 - (100 * (curve.length - 1)) / (CURVE_POLLS - 1);
  at("curve").querySelector("polygon").setAttribute("points", `${left},100 ${points.join(" ")} 100,100`);
  at("running").replaceChildren(number.format(engine.running), made("small", ` of ${number.format(engine.slots)}`));
  at("waiting").textContent = number.format(engine.waiting);
  at("kv").textContent = `${Math.round(100 * engine.kv_usage)} %`;
  at("cached").textContent = engine.prefix_queries ? `${Math.round((100 * engine.prefix_hits) / engine.prefix_queries)} %` : "\u2013";
}

function showRows(state) {
  const rows = state.rows.map((row) => {
    const line = made("tr"), cell = made("td"), label = made("label"), box = made("input"), id = row.name ?? "";
    const known = row.requests !== null, count = (value) => (known ? number.format(value) : "\u2013");
    box.type = "checkbox";
    box.checked = chosen.has(id);
    box.dataset.id = id;
    const name = made("span", row.name ?? "base model");
    name.title = row.name ?? base;
    label.append(box, name);
    cell.append(label);
    const speed = known ? rate((one) => one.rows.find((other) => other.name === row.name)?.new_tokens) : 0;
    const busy = `${row.running}${row.waiting ? ` + ${number.format(row.waiting)}` : ""}`;
    line.append(cell, made("td", count(row.requests)), made("td", known ? busy : "\u2013"), made("td", count(row.new_tokens)));
    line.append(made("td", known ? rounded(speed) : "\u2013"));
    line.classList.toggle("busy", row.running + row.waiting > 0);
    return line;
  });
  const focus = document.activeElement?.dataset?.id;
  at("rows").replaceChildren(...rows);
  if (focus !== undefined) [...at("rows").querySelectorAll("input")].find((box) => box.dataset.id === focus)?.focus();
  const shown = state.rows.filter((row) => row.name !== null).length;
  at("count").textContent = shown < state.found ? `the ${shown} most active of ${number.format(state.found)}` : number.format(state.found);
}

// ---------------------------------------------------------------------------------------------------------- the choice

function showChosen() {
  at("chosen").replaceChildren(...[...chosen].map(([id, name]) => {
    const chip = made("button", name);
    chip.type = "button";
    chip.title = `leave out ${name}`;
    chip.onclick = () => choose(id, name, false);
    return chip;
  }));
  if (!chosen.size) at("chosen").append(made("span", "Choose tenants in the list.", "quiet"));
  for (const box of at("rows").querySelectorAll("input")) box.checked = chosen.has(box.dataset.id);
  at("send").disabled = !chosen.size || running !== null;
}

function choose(id, name, yes) {
  show(at("ask-error"), yes && chosen.size >= MOST_CHOSEN ? `At most ${MOST_CHOSEN} can be compared.` : "");
  if (yes && chosen.size < MOST_CHOSEN) chosen.set(id, name);
  if (!yes) chosen.delete(id);
  showChosen();
}

// --------------------------------------------------------------------------------------------------------- the answers

async function send() {
  if (running !== null || !chosen.size) return;
  const prompt = at("prompt").value;
  show(at("ask-error"), prompt ? "" : "Write a prompt first.");
  if (!prompt) return;
  running = new AbortController();
  at("stop").disabled = false;
  at("send").disabled = true;
  const chat = document.querySelector("[name=mode]:checked").value === "chat";
  const body = { max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value), stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (at("seed").value !== "") body.seed = Number(at("seed").value);
  if (chat) body.messages = [{ role: "user", content: prompt }];
  else body.prompt = prompt;
  at("answers").replaceChildren();
  await Promise.all([...chosen.values()].map((model) => answer(chat ? "v1/chat/completions" : "v1/completions", { model, ...body }, running.signal)));
  running = null;
  at("stop").disabled = true;
  showChosen();
  poll();
}

async function answer(path, body, signal) {
  const card = made("article", undefined, "answer", "live"), text = made("div", "", "text"), foot = made("footer", "waiting", "quiet");
  const words = text.appendChild(document.createTextNode(""));
  const title = made("h3", body.model);
  title.title = body.model;
  card.append(title, text, foot);
  at("answers").append(card);
  const began = performance.now();
  let firstAt = 0, lastAt = 0, firstTokens = 0, lastTokens = 0, usage = null, reason = "";
  const note = (end) => {
    const parts = [];
    if (firstAt) parts.push(`first token ${Math.round(firstAt - began)} ms`);
    if (usage) parts.push(`${number.format(usage.completion_tokens)} tokens`);
    if (lastTokens > firstTokens && lastAt > firstAt) parts.push(`${rounded((1000 * (lastTokens - firstTokens)) / (lastAt - firstAt))} tokens/s`);
    if (end) parts.push(end);
    foot.textContent = parts.join(" \u00b7 ") || "waiting";
  };
  try {
    const response = await fetch(path, { method: "POST", signal, headers: { "content-type": "application/json", ...headers() }, body: JSON.stringify(body) });
    if (!response.ok) throw new Error(await errorOf(response));
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      const piece = choice.text ?? choice.delta?.content ?? "";
      if (piece) {
        [lastAt, lastTokens] = [performance.now(), usage?.completion_tokens ?? 0];
        if (!firstAt) [firstAt, firstTokens] = [lastAt, lastTokens];  // the first piece holds several tokens
        const below = text.scrollHeight - text.scrollTop - text.clientHeight < 30;
        words.appendData(piece);
        if (below) text.scrollTop = text.scrollHeight;
      }
      if (choice.finish_reason) reason = choice.finish_reason === "length" ? "cut at its length" : choice.finish_reason;
      note("");
    }
    note(reason);
  } catch (error) {
    if (signal.aborted) note("stopped");
    else {
      foot.before(made("div", error instanceof TypeError ? "the server does not answer" : error.message, "error"));
      note("failed");
    }
  }
  card.classList.remove("live");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.startsWith("data: ") ? part.slice(6) : "";
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- events

at("rows").addEventListener("change", (event) => choose(event.target.dataset.id, event.target.dataset.id || base, event.target.checked));
at("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(poll, 150); });
at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit(); });
at("stop").addEventListener("click", () => running?.abort());
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(given)) return show(at("key-error"), "A key has letters, digits and signs, and no spaces.");
  key = given;
  at("key").value = "";
  sessionStorage.setItem("para_jax key", key);
  poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
