// The admin's page: how far the work is, how well people judge, their links, batches and exports.

import { element } from "/static/dom.js";
import { post, request } from "/static/outbox.js";
import { texts } from "/static/texts.js";

const REFRESH_MS = 60000;
const SUSPICIOUS = 0.5; // spam score from which on a person is named

export class Admin {
  // changed(): there is something new to show. failed(reply): the last request failed, or null.
  constructor(token, { changed, failed }) {
    Object.assign(this, { token, changed, failed });
    this.seen = null;
    this.invited = null; // {name, link}, which is shown once
    this.asked = null; // the button that must be pressed again
    this.typed = "";
    setInterval(() => document.hidden || document.activeElement?.matches("input") || this.load(), REFRESH_MS);
    this.load();
  }

  async load() {
    const reply = await request(this.token, "admin/overview");
    this.#report(reply);
    if (reply.status !== 200) return;
    this.seen = reply;
    this.changed();
  }

  async #change(path, body) {
    const reply = await post(this.token, `admin/${path}`, body);
    this.#report(reply);
    if (reply.status === 200) await this.load();
    else this.changed();
    return reply;
  }

  #report(reply) {
    this.failed(reply.status === 200 ? null : reply);
  }

  async #invite(name) {
    const reply = await this.#change("invite", { name });
    if (reply.status !== 200) return;
    this.typed = "";
    this.invited = { name, link: `${location.origin}/#${reply.token}` };
    this.changed();
    document.getElementById("invited-link")?.focus();
  }

  async #download(shape) {
    const reply = await downloaded(this.token, shape);
    this.#report(reply);
    if (reply.status !== 200) return;
    const address = URL.createObjectURL(reply.content);
    element("a", { href: address, download: reply.name }).click();
    setTimeout(() => URL.revokeObjectURL(address), REFRESH_MS);
  }

  get node() {
    const words = texts().admin;
    if (!this.seen) return element("p", { class: "message" }, texts().loading);
    return element(
      "div",
      { class: "admin" },
      element("section", {}, element("h2", {}, words.tasks), this.#kinds(words), this.#reviews(words)),
      element("section", {}, element("h2", {}, words.batches), this.#batches(words)),
      element("section", {}, element("h2", {}, words.people), this.#invitation(words), this.#people(words)),
      element("section", {}, element("h2", {}, words.exports), this.#exports(words)),
    );
  }

  #kinds(words) {
    const rows = this.seen.kinds.map((each) => [
      words.kinds[each.name] ?? each.name, each.items, each.judgements, each.missing, figure(each.alpha?.value),
    ]);
    return table(words.tasks, [words.kind, words.items, words.judgements, words.missing, words.alpha], rows);
  }

  #reviews(words) {
    const { waiting, accepted, rejected } = this.seen.reviews;
    const isUsed = waiting + accepted + rejected > 0;
    return isUsed ? element("p", { class: "hint" }, words.reviews(waiting, accepted, rejected)) : "";
  }

  #batches(words) {
    const rows = this.seen.batches.map((each) => {
      const turn = () => this.#change("finish", { batch: each.name, finished: !each.finished });
      const bar = element("progress", {
        value: each.judgements, max: Math.max(1, each.judgements + each.missing), "aria-label": each.name,
      });
      return [
        element("bdi", {}, each.name), each.items, each.judgements, each.missing, bar,
        each.over
          ? "" // the run that asked for it has gone on
          : each.finished
            ? this.#button(words.reopen, each.name, "finish", turn)
            : this.#careful([words.finish, words.reallyFinish], each.name, "finish", turn),
      ];
    });
    return table(words.batches, [words.batch, words.items, words.judgements, words.missing, words.done, ""], rows);
  }

  #people(words) {
    const rates = this.seen.people.some((each) => each.ratings !== null);
    const reviews = this.seen.people.some((each) => each.reviews !== null);
    const rows = this.seen.people.map((each) => [
      element("bdi", {}, each.name),
      each.num, figure(each.seconds, 1), figure(each.with_others), figure(each.with_gold),
      ...(rates ? [figure(each.ratings)] : []), ...(reviews ? [figure(each.reviews)] : []),
      spam(each, words),
      each.revoked ? words.revoked : each.paused ? words.paused : words.active,
      element(
        "div",
        { class: "row" },
        this.#button(each.paused ? words.resume : words.pause, each.name, "pause", () =>
          this.#change("pause", { name: each.name, paused: !each.paused })),
        this.#careful([words.newLink, words.reallyNewLink], each.name, "link", () => this.#invite(each.name)),
        each.revoked ? "" : this.#careful([words.revoke, words.reallyRevoke], each.name, "revoke", () =>
          this.#change("revoke", { name: each.name })),
      ),
    ]);
    const heads = [
      words.name, words.judgements, words.seconds, words.withOthers, words.withGold,
      ...(rates ? [words.ratings] : []), ...(reviews ? [words.reviewed] : []), words.spam, words.state, "",
    ];
    return rows.length ? table(words.people, heads, rows) : element("p", { class: "hint" }, words.nobody);
  }

  #invitation(words) {
    const field = element("input", {
      id: "invite-name", maxlength: "80", autocomplete: "off", required: true, dir: "auto",
      on: { input: () => (this.typed = field.value) },
    });
    field.value = this.typed;
    const form = element(
      "form",
      { class: "row", on: { submit: (event) => { event.preventDefault(); this.#invite(field.value.trim()); } } },
      element("label", { for: "invite-name" }, words.inviteName),
      field,
      element("button", { class: "main", id: "invite" }, words.invite),
    );
    if (!this.invited) return form;
    const { name, link } = this.invited;
    const shown = element("input", {
      id: "invited-link", readonly: true, value: link, dir: "ltr", on: { focus: () => shown.select() },
    });
    const copy = navigator.clipboard
      ? element("button", { type: "button", id: "copy", on: { click: () => navigator.clipboard.writeText(link) } }, texts().copy)
      : ""; // browsers have it only with HTTPS or on this machine
    const hide = () => { this.invited = null; this.changed(); };
    return element(
      "div",
      {},
      form,
      element("p", { role: "status" }, element("label", { for: "invited-link" }, words.link(name))),
      element("div", { class: "row link" }, shown, copy, element("button", { type: "button", id: "hide", on: { click: hide } }, texts().close)),
    );
  }

  #exports(words) {
    return element(
      "ul",
      { class: "exports" },
      ...this.seen.shapes.map((shape) =>
        element(
          "li",
          {},
          element("button", { type: "button", id: `export-${shape}`, on: { click: () => this.#download(shape) } }, shape),
          element("span", { class: "hint" }, words.shapes[shape] ?? ""),
        )),
    );
  }

  #button(label, name, action, pressed) {
    return element(
      "button",
      { type: "button", "aria-label": `${label}: ${name}`, "data-key": `${action}\n${name}`, on: { click: pressed } },
      label,
    );
  }

  // A button that acts when it is pressed twice.
  #careful([label, question], name, action, act) {
    const isAsked = this.asked === `${action}\n${name}`;
    const button = this.#button(isAsked ? question : label, name, action, () => {
      this.asked = isAsked ? null : button.dataset.key;
      if (!isAsked) return this.changed();
      button.disabled = true;
      act();
    });
    button.addEventListener("keydown", (event) => event.repeat && event.preventDefault()); // a held key presses once
    if (isAsked) button.className = "warn";
    return button;
  }
}

// {status, code, content, name}
async function downloaded(token, shape) {
  try {
    const response = await fetch(`/api/admin/export/${shape}`, {
      headers: { Authorization: `Bearer ${token}` }, cache: "no-store", credentials: "omit",
    });
    if (!response.ok) return { ...(await response.json()), status: response.status };
    const name = /filename="(.+)"/.exec(response.headers.get("Content-Disposition"))?.[1] ?? shape;
    return { status: 200, content: await response.blob(), name };
  } catch {
    return { status: 0 };
  }
}

function spam(person, words) {
  const isSuspicious = person.spam >= SUSPICIOUS || person.copy_of;
  const text = person.copy_of ? `${figure(person.spam)} ${words.sameAs(person.copy_of)}` : figure(person.spam);
  return isSuspicious ? element("strong", { class: "suspicious" }, text) : text;
}

function figure(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

// In narrow windows each row is a card, whose cells show the heads of their columns.
function table(name, heads, rows) {
  return element(
    "table",
    { role: "table", "aria-label": name },
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...heads.map((head) =>
      element(head ? "th" : "td", head ? { role: "columnheader", scope: "col" } : { role: "cell" }, head)))),
    element("tbody", { role: "rowgroup" }, ...rows.map((row) =>
      element("tr", { role: "row" }, ...row.map((cell, column) => {
        const kind = column ? { role: "cell", "data-head": heads[column] } : { role: "rowheader", scope: "row" };
        return element(column ? "td" : "th", kind, cell);
      })))),
  );
}
