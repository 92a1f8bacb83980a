// What a person has entered, by task: until its answer is confirmed, and that of the last tasks longer, because they can
// be opened again. A text that was not sent or was refused is kept until its task comes back or the person discards it.

import { forget, keep, stored } from "/static/outbox.js";

const PREFIX = "labelling.draft.";
const NUM_SPARE = 20; // entries that are no unsent texts; older ones are forgotten
export const ENTERED = "entered", SENDING = "sending", SENT = "sent", REFUSED = "refused";

export class Drafts {
  constructor(name) {
    this.prefix = `${PREFIX}${name}\n`; // no name contains a line break
    this.entries = stored(this.prefix).sort((one, other) => one.at - other.at); // {showing, task, draft, seconds, state, at}
  }

  // Whether the browser keeps it.
  keep(task, draft, seconds) {
    return this.#put({ showing: task.showing, task, draft, seconds, state: ENTERED });
  }

  at(showing) {
    return this.entries.find((each) => each.showing === showing);
  }

  // {draft, seconds} of a task, also if it was entered when its item was shown before; null: nothing was.
  of(task) {
    const isEarlier = (each) => each.state !== SENDING && each.task && isSame(each.task, task);
    const found = this.at(task.showing) ?? this.entries.filter(isEarlier).at(-1);
    if (!found || found.showing === task.showing) return found ?? null;
    this.discard(found.showing);
    return { draft: reordered(found.draft, found.task.replies, task.replies), seconds: found.seconds };
  }

  mark(showing, state) {
    const found = this.at(showing);
    if (found) this.#put({ ...found, state });
  }

  // `body` is that of the request which got this reply.
  refuse(body, { code, status }) {
    const found = this.at(body.showing) ?? { showing: body.showing, task: null, draft: body.answer ?? {}, seconds: 0 };
    this.#put({ ...found, state: REFUSED, code, status });
  }

  // Texts that are not sent, but that of the task at hand.
  unsent(task) {
    return this.entries.filter((each) => isUnsent(each) && each.showing !== task?.showing);
  }

  discard(showing) {
    forget(this.prefix + showing);
    this.entries = this.entries.filter((each) => each.showing !== showing);
  }

  #put(entry) {
    const fresh = { ...entry, at: Date.now() };
    this.entries = [...this.entries.filter((each) => each.showing !== entry.showing), fresh];
    const spare = this.entries.filter((each) => !isUnsent(each) && each.state !== SENDING);
    for (const each of spare.slice(0, -NUM_SPARE)) this.discard(each.showing);
    return keep(this.prefix + entry.showing, fresh);
  }
}

function isUnsent({ state, draft }) {
  return (state === ENTERED || state === REFUSED) && Boolean(draft.text?.trim());
}

// Whether two tasks show one item. Its replies may be in another order.
function isSame(one, other) {
  const content = ({ kind, messages, replies }) => JSON.stringify([kind, messages, [...replies].sort()]);
  return content(one) === content(other);
}

function reordered(draft, before, now) {
  const places = now.map((reply) => before.indexOf(reply));
  return {
    ...draft,
    ...(draft.ranks && { ranks: places.map((place) => draft.ranks[place]) }),
    ...(draft.preference && { preference: places[0] === 0 ? draft.preference : -draft.preference }),
  };
}
