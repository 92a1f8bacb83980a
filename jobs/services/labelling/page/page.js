// The page: gets a task, shows it, keeps what is entered, hands the answer to the outbox, gets the next task.

import { Admin } from "/static/admin.js";
import { element, formatted } from "/static/dom.js";
import { Drafts, SENDING, SENT } from "/static/drafts.js";
import { keptText } from "/static/kept.js";
import { Outbox, forget, keep, kept, newId, post, request } from "/static/outbox.js";
import { viewOf } from "/static/tasks.js";
import { language, reasonOf, switchLanguage, texts } from "/static/texts.js";

const LINK = "labelling.link"; // {token, name, role}
const TASK = "labelling.task."; // + name: the showing at hand
const POLL_MS = 15000;
const COUNT_EVERY = 10; // answers between two questions for the exact progress
const IDLE_MS = 60000; // without a key or a touch: no more time is counted

const at = (id) => document.getElementById(id);
let link, outbox, drafts, me, task, view, admin;
let seconds = 0;
let activeAt = performance.now();
let message = () => texts().loading; // shown when there is no task
let notice = null; // a line about what was last refused or missing
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
  drafts = new Drafts(link.name);
  const unfinished = drafts.at(kept(TASK + link.name));
  if (unfinished) show(unfinished.task); // before the server answers, if it does
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
    if (reply.status === 401) return endLink();
    if (!outbox) showTrouble({ count: 0, trouble: "away" });
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// The link is not valid any more. False, for those who ask who it belongs to.
function endLink() {
  if (view) showTrouble({ count: outbox.count, trouble: "link" });
  say(() => texts().badLink);
  return false;
}

async function next() {
  const mine = ++generation;
  for (;;) {
    await outbox.empty();
    const reply = await post(link.token, "next", {});
    if (mine !== generation) return;
    if (reply.status === 401) return endLink();
    if (reply.status === 200 && reply.task) {
      showTrouble({ count: outbox.count, trouble: null });
      if (reply.task.showing !== task?.showing) {
        const before = task?.showing;
        show(reply.task);
        noteLoss(before);
      }
      return;
    }
    if (reply.status === 200) {
      showTrouble({ count: outbox.count, trouble: null });
      const before = task?.showing;
      task = view = null;
      noteLoss(before);
      forget(TASK + link.name);
      say(() => (reply.paused ? texts().paused : texts().empty));
    } else {
      showTrouble({ count: outbox.count, trouble: reply.status === 507 ? "full" : "away" });
    }
    await new Promise((resolve) => setTimeout(resolve, reply.status === 200 ? POLL_MS : 2000));
    if (mine !== generation) return;
  }
}

// Says that a task went to somebody else, if the person has written something for it.
function noteLoss(showing) {
  if (!drafts.unsent(task).some((each) => each.showing === showing)) return;
  notice = () => texts().taskGone;
  showNotice();
}

function show(newTask) {
  const entered = drafts.of(newTask);
  task = newTask;
  seconds = entered?.seconds ?? 0;
  view = viewOf(task, entered?.draft ?? null, remember);
  keep(TASK + link.name, task.showing);
  remember();
  render();
  scrollTo(0, 0);
  view.focus();
}

function remember() {
  if (!drafts.keep(task, view.draft(), seconds)) {
    notice = () => texts().noStorage;
    showNotice();
  }
}

function submit() {
  const answer = view?.answer();
  if (!view) return;
  if (!answer) {
    notice = ((asked) => () => asked.problem)(view);
    return showNotice();
  }
  leave("judgements", { id: newId(), showing: task.showing, seconds: Math.round(seconds * 10) / 10, answer });
}

function skip() {
  if (view) leave("skip", { showing: task.showing });
}

function leave(path, body) {
  notice = null;
  remember();
  drafts.mark(body.showing, SENDING);
  outbox.add(path, body);
  forget(TASK + link.name);
  task = view = null;
  say(() => texts().loading);
  next();
}

async function undo() {
  if (!me?.last || outbox.count) return;
  const reply = await post(link.token, "undo", { showing: me.last });
  const { status } = reply;
  if (status === 0 || status >= 500) return showTrouble({ count: 0, trouble: status === 507 ? "full" : "away" });
  if (status === 401) return endLink();
  if (status >= 400) return showRefusal(reply);
  await meet();
  task = view = null;
  next();
}

function confirmed({ path, body }) {
  drafts.mark(body.showing, SENT);
  if (!me) return;
  me.left = Math.max(0, me.left - 1);
  me.last = body.showing;
  if (path === "judgements") me.done += 1;
  if (path === "judgements" && me.done % COUNT_EVERY === 0) meet();
  showProgress();
}

function refused(reply, { body }) {
  drafts.refuse(body, reply);
  showKept();
  showRefusal(reply);
}

function showRefusal(reply) {
  notice = () => texts().refused(reasonOf(reply));
  showNotice();
}

// Of the admin; null: it did not fail.
function showFailure(reply) {
  notice = reply && (() => {
    if (reply.status === 401) return texts().badLink;
    if (reply.status === 507) return texts().fullDisk;
    return reply.status === 0 || reply.status >= 500 ? texts().away(0) : texts().failed(reasonOf(reply));
  });
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

// What is not sent, beside the task at hand. It is made again only if it has changed, so that the focus stays.
function showKept() {
  const words = texts();
  const found = drafts?.unsent(task) ?? [];
  const signature = JSON.stringify([language(), found.map(({ showing, state, at }) => [showing, state, at])]);
  at("kept").hidden = !found.length;
  if (at("kept").dataset.shows === signature) return;
  at("kept").dataset.shows = signature;
  at("kept-title").textContent = words.keptTexts(found.length);
  at("kept-texts").replaceChildren(...found.map((entry) =>
    keptText(entry, () => {
      drafts.discard(entry.showing);
      showKept();
      at(at("kept").hidden ? "task" : "kept-title").focus();
    })));
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
  showKept();
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
  if (admin || at("keys").open || event.target.closest("#kept") || event.altKey || event.metaKey || event.isComposing) return;
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
