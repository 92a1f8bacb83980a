// Answers that must not get lost. Each is in the browser's storage before it is sent, and leaves it after the server has
// confirmed or finally refused it. They are sent in order, and again until there is a reply; the id in a judgement makes
// the server count it once, also if two tabs send it.

const PREFIX = "labelling.outbox.";
const RETRY_MS = [500, 1000, 2000, 4000, 8000, 15000];
const TIMEOUT_MS = 20000;

export class Outbox {
  // changed({count, trouble}): trouble is null, "away", "full" or "link". confirmed(entry). refused(reply, entry).
  constructor(token, name, { changed, confirmed, refused }) {
    Object.assign(this, { token, changed, confirmed, refused });
    this.prefix = `${PREFIX}${name}\n`; // no name contains a line break
    this.entries = stored(this.prefix);
    this.trouble = null;
    this.keeps = true; // whether the browser has room for what is unsent
    this.waiters = [];
    this.running = false;
    addEventListener("online", () => this.#wake());
    document.addEventListener("visibilitychange", () => this.#wake());
  }

  add(path, body) {
    const entry = { key: `${this.prefix}${Date.now()}.${newId()}`, path, body };
    this.keeps = keep(entry.key, entry);
    this.entries.push(entry);
    this.send();
  }

  get count() {
    return this.entries.length;
  }

  // Resolves when everything has been sent.
  empty() {
    if (!this.entries.length) return Promise.resolve();
    this.send();
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  async send() {
    if (this.running) return;
    this.running = true;
    let failures = 0;
    while (this.entries.length) {
      const entry = this.entries[0];
      const reply = await post(this.token, entry.path, entry.body);
      if (reply.status === 401) {
        this.#report("link");
        break;
      }
      if (reply.status === 0 || reply.status === 429 || reply.status >= 500) {
        if (reply.status !== 429) this.#report(reply.status === 507 ? "full" : "away");
        await this.#pause(RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
        continue;
      }
      failures = 0;
      this.entries.shift();
      if (reply.status >= 400) this.refused(reply, entry);
      else this.confirmed(entry);
      forget(entry.key);
      this.#report(null);
    }
    this.running = false;
    if (!this.entries.length) for (const resolve of this.waiters.splice(0)) resolve();
  }

  #report(trouble) {
    this.trouble = trouble;
    this.changed({ count: this.count, trouble });
  }

  #pause(ms) {
    return new Promise((resolve) => {
      this.wakeUp = resolve;
      setTimeout(resolve, ms);
    });
  }

  #wake() {
    this.wakeUp?.();
    if (this.entries.length) this.send();
  }
}

// The values whose keys begin so.
export function stored(prefix) {
  try {
    const keys = Object.keys(localStorage).filter((key) => key.startsWith(prefix));
    return keys.sort().map((key) => JSON.parse(localStorage.getItem(key)));
  } catch {
    return [];
  }
}

// Whether the browser keeps the value.
export function keep(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function kept(key) {
  try {
    return JSON.parse(localStorage.getItem(key) ?? "null");
  } catch {
    return null;
  }
}

export function forget(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // Nothing was kept.
  }
}

export function post(token, path, body) {
  return request(token, path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

// {status, ...reply}; status 0: the server did not answer.
export async function request(token, path, options = {}) {
  try {
    const response = await fetch(`/api/${path}`, {
      ...options,
      headers: { ...options.headers, Authorization: `Bearer ${token}` },
      signal: AbortSignal.timeout(TIMEOUT_MS),
      cache: "no-store",
      credentials: "omit",
    });
    const reply = await response.json();
    return { ...reply, status: response.status };
  } catch {
    return { status: 0 };
  }
}

// 128 random bits. crypto.randomUUID exists only with HTTPS.
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
