// The kinds of tasks. Each view has `node`, `draft()` (what was entered so far), `answer()` (null: incomplete),
// `problem` (what is missing), `key(key)` (whether the key meant something) and `focus()`.

import { element, formatted } from "/static/dom.js";
import { texts } from "/static/texts.js";

const LONG_CHARACTERS = 1500;
const LONG_LINES = 25;

export function viewOf(task, draft, changed) {
  return new VIEWS[task.kind](task, draft, changed);
}

class View {
  constructor(task, changed) {
    this.task = task;
    this.changed = changed;
    this.current = 0;
    const words = texts();
    this.node = element(
      "div",
      {},
      element("section", { "aria-label": words.conversation }, ...task.messages.map(turn)),
      element("p", { class: "hint", id: "instruction" }, this.instruction(words)),
    );
  }

  instruction(words) {
    return words[this.task.kind];
  }

  addReplies(extras) {
    this.articles = this.task.replies.map((text, place) => {
      const row = extras?.(place);
      const body = collapsible(text);
      const article = element(
        "article",
        { class: "reply", tabindex: "0", "aria-label": this.label(place), on: { focus: () => this.mark(place) } },
        element("p", { class: "role" }, this.label(place)),
        body.node,
        ...(row ? [row] : []),
      );
      article.toggle = body.toggle;
      return article;
    });
    const two = this.articles.length === 2 ? " two" : "";
    this.node.append(element("section", { class: `replies${two}` }, ...this.articles));
    this.mark(0);
  }

  label(place) {
    return texts().reply(place + 1);
  }

  mark(place) {
    this.current = place;
    this.articles.forEach((article, other) => article.classList.toggle("current", other === place));
  }

  move(by) {
    const count = this.articles.length;
    this.articles[(this.current + by + count) % count].focus();
  }

  key(key) {
    if (!this.articles) return false;
    if (key === "ArrowDown") this.move(1);
    else if (key === "ArrowUp") this.move(-1);
    else if (key === "e") this.articles[this.current].toggle();
    else return false;
    return true;
  }

  focus() {
    this.articles?.[this.current].focus({ preventScroll: true });
  }
}

class Rank extends View {
  constructor(task, draft, changed) {
    super(task, changed);
    this.ranks = draft?.ranks ?? task.replies.map(() => 0); // 0: not yet, null: not rankable
    this.buttons = task.replies.map(() => []);
    this.addReplies((place) => {
      const row = element("div", { class: "row", role: "group", "aria-label": this.label(place) });
      for (const rank of [...task.replies.map((_, index) => index + 1), null]) {
        const label = rank === null ? texts().unrankable : String(rank);
        const button = choice(label, rank === null ? label : texts().rankOf(rank), () => this.give(place, rank));
        button.rank = rank;
        this.buttons[place].push(button);
        row.append(button);
      }
      return row;
    });
    this.show();
  }

  give(place, rank) {
    this.ranks[place] = rank;
    this.show();
    this.changed();
  }

  show() {
    this.buttons.forEach((row, place) =>
      row.forEach((button) => button.setAttribute("aria-pressed", String(button.rank === this.ranks[place]))),
    );
  }

  key(key) {
    const rank = Number(key);
    if (/^[0-9]$/.test(key) && rank <= this.ranks.length) {
      this.give(this.current, rank === 0 ? null : rank);
      const next = this.ranks.indexOf(0);
      if (next >= 0) this.articles[next].focus();
      return true;
    }
    return super.key(key);
  }

  draft() {
    return { ranks: this.ranks };
  }

  answer() {
    return !this.ranks.includes(0) ? { kind: "rank", ranks: this.ranks } : null;
  }

  get problem() {
    return texts().incompleteRank;
  }
}

class Compare extends View {
  constructor(task, draft, changed) {
    super(task, changed);
    this.preference = draft?.preference ?? null;
    this.addReplies();
    const words = texts();
    this.buttons = [-3, -2, -1, 0, 1, 2, 3].map((preference) => {
      const side = preference < 0 ? words.first : words.second;
      const label = preference === 0 ? words.tie : side(words.strength[Math.abs(preference)]);
      const button = choice(label, label, () => this.give(preference));
      button.preference = preference;
      return button;
    });
    this.node.append(element("div", { class: "row center", role: "group", "aria-labelledby": "instruction" }, ...this.buttons));
    this.show();
  }

  give(preference) {
    this.preference = preference;
    this.show();
    this.changed();
  }

  show() {
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.preference === this.preference));
  }

  key(key) {
    if (/^[1-7]$/.test(key)) this.give(Number(key) - 4);
    else if (key === "ArrowLeft" || key === "ArrowRight") {
      const by = key === "ArrowLeft" ? -1 : 1;
      this.give(Math.max(-3, Math.min(3, (this.preference ?? 0) + by)));
    } else return super.key(key);
    return true;
  }

  draft() {
    return { preference: this.preference };
  }

  answer() {
    return this.preference === null ? null : { kind: "compare", preference: this.preference };
  }

  get problem() {
    return texts().incompleteCompare;
  }
}

class Rate extends View {
  constructor(task, draft, changed) {
    super(task, changed);
    this.rating = draft?.rating ?? null;
    this.flags = new Set(draft?.flags ?? []);
    this.addReplies();
    const words = texts();
    this.ratings = [1, 2, 3, 4, 5].map((value) => choice(String(value), words.rating(value), () => this.give(value)));
    this.marks = Object.entries(words.flags).map(([flag, label]) => {
      const button = choice(label, label, () => this.toggle(flag), "0");
      button.flag = flag;
      return button;
    });
    this.node.append(
      element("div", { class: "row center", role: "group", "aria-labelledby": "instruction" }, ...this.ratings),
      element("div", { class: "row center", role: "group", "aria-labelledby": "instruction" }, ...this.marks),
    );
    this.show();
  }

  give(rating) {
    this.rating = this.rating === rating ? null : rating;
    this.show();
    this.changed();
  }

  toggle(flag) {
    if (!this.flags.delete(flag)) this.flags.add(flag);
    this.show();
    this.changed();
  }

  show() {
    this.ratings.forEach((button, index) => button.setAttribute("aria-pressed", String(index + 1 === this.rating)));
    for (const button of this.marks) button.setAttribute("aria-pressed", String(this.flags.has(button.flag)));
  }

  key(key) {
    if (/^[1-5]$/.test(key)) this.give(Number(key));
    else if (key === "s") this.toggle("spam");
    else return super.key(key);
    return true;
  }

  draft() {
    return { rating: this.rating, flags: [...this.flags] };
  }

  answer() {
    return this.rating === null && !this.flags.size ? null : { kind: this.task.kind, ...this.draft() };
  }

  get problem() {
    return texts().incompleteRate;
  }
}

// Of a text that another person wrote.
class Review extends Rate {
  instruction(words) {
    return this.isPrompt ? words.reviewPrompt : words.reviewReply;
  }

  label() {
    return this.isPrompt ? texts().writtenPrompt : texts().writtenReply;
  }

  get isPrompt() {
    return this.task.messages.at(-1)?.role !== "user";
  }
}

class Write extends View {
  constructor(task, draft, changed) {
    super(task, changed);
    this.area = element("textarea", {
      "aria-label": this.label(),
      dir: "auto",
      maxlength: "32000",
      on: { input: () => this.changed() },
    });
    this.area.value = draft?.text ?? "";
    this.node.append(this.area);
  }

  label() {
    return texts().yourReply;
  }

  draft() {
    return { text: this.area.value };
  }

  answer() {
    return this.area.value.trim() ? { kind: this.task.kind, text: this.area.value } : null;
  }

  get problem() {
    return texts().incompleteWrite;
  }

  focus() {
    this.area.focus({ preventScroll: true });
  }
}

class Prompt extends Write {
  label() {
    return texts().yourPrompt;
  }
}

const VIEWS = { rank: Rank, compare: Compare, rate: Rate, write: Write, prompt: Prompt, review: Review };

function choice(label, name, chosen, tabindex = "-1") {
  return element(
    "button",
    { type: "button", class: "choice", tabindex, "aria-label": name, "aria-pressed": "false", on: { click: chosen } },
    label,
  );
}

function turn(message) {
  const role = texts().roles[message.role] ?? message.role;
  return element(
    "div",
    { class: `turn ${message.role === "user" ? "user" : ""}` },
    element("p", { class: "role" }, role),
    collapsible(message.content).node,
  );
}

function collapsible(text) {
  const body = formatted(text);
  const isLong = text.length > LONG_CHARACTERS || text.split("\n").length > LONG_LINES;
  if (!isLong) return { node: body, toggle() {} };
  const button = element("button", { type: "button", "aria-expanded": "false" }, texts().more);
  function toggle() {
    const isOpen = !body.classList.toggle("long");
    button.textContent = isOpen ? texts().less : texts().more;
    button.setAttribute("aria-expanded", String(isOpen));
  }
  body.classList.add("long");
  button.addEventListener("click", toggle);
  return { node: element("div", {}, body, button), toggle };
}
