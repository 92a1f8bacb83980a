// The page: gets a task, shows it, keeps the draft, hands the answer to the outbox, gets the next task.

import { Admin } from "/static/admin.js";
import { element, formatted } from "/static/dom.js";
import { Outbox, forget, keep, kept, newId, post, request } from "/static/outbox.js";
import { viewOf } from "/static/tasks.js";
import { language, switchLanguage, texts } from "/static/texts.js";

const LINK = "labelling.link"; // {token, name, role}
const TASK = "labelling.task."; // + name: {task, draft, seconds}
const LAST = "labelling.last."; // + name: {id, showing, draft} of the answer that can be undone
const POLL_MS = 15000;
const COUNT_EVERY = 10; // answers between two questions for the exact progress
const IDLE_MS = 60000; // without a key or a touch: no more time is counted

const at = (id) => document.getElementById(id);
let link, outbox, me, task, view, admin;
let seconds = 0;
let activeAt = performance.now();
let message = () => texts().loading; // shown when there is no task
let notice = null; // a line about the last answer that was refused
let trouble = null; // {count, trouble} of the outbox, while the server does not take answers
let generation = 0; // of questions for a task: replies to older ones are ignored

start();

async function start() {
  wire();
  render();
  const given = location.hash.slice(1);
  link = given ? { token: given, name: null } : kept(LINK);
  if (given) history.replaceState(null, "", location.pathname); // not in the history, nor on a screen that is shared
  const old = kept(LINK);
  if (link && old?.token === link.token) link = old;
  if (!link) return say(() => texts().noLink);
  if (given) keep(LINK, link);
  if (link.name === null && !(await meet())) return;
  if (link.role === "admin") return administrate();
  outbox = new Outbox(link.token, link.name, { changed: showTrouble, confirmed, refused });
  const unfinished = kept(TASK + link.name);
  if (unfinished) show(unfinished.task, unfinished.draft, unfinished.seconds); // before the server answers, if it does
  if (!me) meet();
  await next();
}

function administrate() {
  admin = new Admin(link.token, { changed: render, failed: showFailure });
  render();
}

// Asks who this link belongs to, until there is an answer. False: to nobody.
async function meet() {
  for (;;) {
    const reply = await request(link.token, "me");
    if (reply.status === 200) {
      me = reply;
      Object.assign(link, { name: reply.name, role: reply.role });
      keep(LINK, link);
      render();
      return true;
    }
    if (reply.status === 401) {
      say(() => texts().badLink);
      return false;
    }
    if (!outbox) showTrouble({ count: 0, trouble: "away" });
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

async function next() {
  const mine = ++generation;
  for (;;) {
    await outbox.empty();
    const reply = await post(link.token, "next", {});
    if (mine !== generation) return;
    if (reply.status === 401) return say(() => texts().badLink);
    if (reply.status === 200 && reply.task) {
      showTrouble({ count: outbox.count, trouble: null });
      if (reply.task.showing !== task?.showing) show(reply.task, draftOf(reply.task.showing), 0);
      return;
    }
    if (reply.status === 200) {
      showTrouble({ count: outbox.count, trouble: null });
      task = view = null;
      forget(TASK + link.name);
      say(() => (reply.paused ? texts().paused : texts().empty));
    } else {
      showTrouble({ count: outbox.count, trouble: reply.status === 507 ? "full" : "away" });
    }
    await new Promise((resolve) => setTimeout(resolve, reply.status === 200 ? POLL_MS : 2000));
    if (mine !== generation) return;
  }
}

// What was entered for a task before it was undone.
function draftOf(showing) {
  const last = kept(LAST + link.name);
  return last?.showing === showing ? last.draft : null;
}

function show(newTask, draft, spent) {
  task = newTask;
  seconds = spent;
  view = viewOf(task, draft, remember);
  remember();
  render();
  scrollTo(0, 0);
  view.focus();
}

function remember() {
  const keeps = keep(TASK + link.name, { task, draft: view.draft(), seconds });
  if (!keeps) {
    notice = () => texts().noStorage;
    showNotice();
  }
}

function submit() {
  const answer = view?.answer();
  if (!view) return;
  if (!answer) {
    notice = ((problem) => () => problem)(view.problem);
    return showNotice();
  }
  const id = newId();
  keep(LAST + link.name, { id, showing: task.showing, draft: view.draft() });
  leave("judgements", { id, showing: task.showing, seconds: Math.round(seconds * 10) / 10, answer });
}

function skip() {
  if (view) leave("skip", { showing: task.showing });
}

function leave(path, body) {
  notice = null;
  outbox.add(path, body);
  forget(TASK + link.name);
  task = view = null;
  say(() => texts().loading);
  next();
}

async function undo() {
  if (!me?.last || outbox.count) return;
  const { status, detail } = await post(link.token, "undo", { id: me.last });
  if (status === 0 || status >= 500) return showTrouble({ count: 0, trouble: status === 507 ? "full" : "away" });
  if (status >= 400) return refused(detail);
  await meet();
  task = view = null;
  next();
}

function confirmed(entry) {
  if (entry.path !== "judgements" || !me) return;
  me.done += 1;
  me.left = Math.max(0, me.left - 1);
  me.last = entry.body.id;
  if (me.done % COUNT_EVERY === 0) meet();
  showProgress();
}

function refused(detail) {
  notice = () => texts().refused(detail ?? "");
  showNotice();
}

function showFailure(status, detail) {
  const isAway = status === 0 || status >= 500;
  const words = () => (status === 401 ? texts().badLink : status === 507 ? texts().fullDisk : isAway ? texts().away(0) : detail);
  notice = status === null ? null : words;
  showNotice();
}

function showTrouble(found) {
  trouble = found.trouble ? found : null;
  showProgress();
  showNotice();
}

function showNotice() {
  const words = texts();
  const troubles = { away: words.away, full: words.full, link: () => words.badLink };
  const lines = [trouble && troubles[trouble.trouble](trouble.count), outbox && !outbox.keeps && words.noStorage, notice?.()];
  at("notice").textContent = lines.filter(Boolean).join(" ");
  at("notice").hidden = !at("notice").textContent;
}

function showProgress() {
  at("progress").textContent = me && !admin ? texts().progress(me.done, me.left) : "";
  at("undo").disabled = !me?.last || Boolean(outbox?.count);
  at("undo").hidden = at("help").hidden = Boolean(admin);
}

function say(words) {
  message = words;
  render();
}

function render() {
  const words = texts();
  document.documentElement.lang = language();
  document.title = words.title;
  for (const [id, text] of Object.entries({
    title: words.title, undo: words.undo, help: words.help, language: words.other, skip: words.skip,
    submit: words.submit, "guidelines-title": words.guidelines, "keys-title": words.help, "keys-close": words.close,
  })) at(id).textContent = text;
  at("keys-table").replaceChildren(
    ...words.keys.map(([key, what]) => element("tr", {}, element("td", {}, element("kbd", {}, key)), element("td", {}, what))),
  );
  at("beside").hidden = !me?.guidelines || Boolean(admin);
  if (me?.guidelines) at("guidelines").replaceChildren(formatted(me.guidelines));
  at("actions").hidden = !view;
  showContent(admin ? admin.node : view ? view.node : element("p", { class: "message" }, message()));
  showProgress();
  showNotice();
}

// The focus stays on what has it.
function showContent(node) {
  if (at("task").firstChild === node) return;
  const focused = at("task").contains(document.activeElement) ? document.activeElement : null;
  at("task").replaceChildren(node);
  if (!admin || !focused) return;
  const same = [...at("task").querySelectorAll("button, input")].find((each) =>
    focused.dataset.key ? each.dataset.key === focused.dataset.key : each.id === focused.id);
  (same ?? at("task")).focus({ preventScroll: true });
}

function wire() {
  at("guidelines-details").open = matchMedia("(min-width: 44rem)").matches; // beside the task and not above it
  at("submit").addEventListener("click", submit);
  at("skip").addEventListener("click", skip);
  at("undo").addEventListener("click", undo);
  at("help").addEventListener("click", () => at("keys").showModal());
  at("keys-close").addEventListener("click", () => at("keys").close());
  at("language").addEventListener("click", () => {
    switchLanguage();
    if (view) view = viewOf(task, view.draft(), remember);
    render();
  });
  addEventListener("keydown", onKey);
  for (const sign of ["keydown", "pointerdown", "wheel", "touchmove"]) {
    addEventListener(sign, () => (activeAt = performance.now()), { passive: true });
  }
  setInterval(() => {
    if (view && !document.hidden && performance.now() - activeAt < IDLE_MS) seconds += 1;
  }, 1000);
  setInterval(() => {
    if (view && me && performance.now() - activeAt < IDLE_MS) post(link.token, "keep", { showing: task.showing });
  }, 60000);
}

function onKey(event) {
  if (admin || at("keys").open || event.altKey || event.metaKey || event.isComposing) return;
  const isWriting = event.target.matches("textarea");
  if (event.key === "Enter" && (event.ctrlKey || !isWriting)) {
    if (!event.ctrlKey && event.target.matches("button:not(.choice), summary")) return; // it is pressed
    if (!event.repeat) submit();
  } else if (isWriting || event.ctrlKey) {
    return;
  } else if (event.key === "?") {
    at("keys").showModal();
  } else if (event.key === "Backspace") {
    if (!event.repeat) skip();
  } else if (event.key === "u") {
    if (!event.repeat) undo();
  } else if (!view?.key(event.key)) {
    return;
  }
  event.preventDefault();
}
