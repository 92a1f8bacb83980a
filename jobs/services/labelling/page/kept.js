// Texts of the person that were not sent or were refused, to copy or to discard.

import { REFUSED } from "/static/drafts.js";
import { element } from "/static/dom.js";
import { reasonOf, texts } from "/static/texts.js";

const EXCERPT = 160; // characters of what the text was written for

export function keptText(entry, discard) {
  const words = texts();
  const asked = entry.task?.messages.at(-1)?.content ?? "";
  const area = element("textarea", { readonly: true, dir: "auto", "aria-label": words.keptText });
  area.value = entry.draft.text;
  return element(
    "section",
    {},
    element("p", {}, entry.state === REFUSED ? words.refused(reasonOf(entry)) : words.notSent),
    asked && element("p", { class: "hint", dir: "auto" }, asked.length > EXCERPT ? `${asked.slice(0, EXCERPT)}…` : asked),
    area,
    element("div", { class: "row" }, copying(area, words), discarding(discard, words)),
  );
}

function copying(area, words) {
  const button = element("button", { type: "button" }, words.copy);
  button.addEventListener("click", async () => {
    area.select();
    await navigator.clipboard.writeText(area.value);
    button.textContent = words.copied;
  });
  return navigator.clipboard ? button : ""; // browsers have it only with HTTPS or on this machine
}

// Discards when it is pressed twice.
function discarding(discard, words) {
  const button = element("button", { type: "button" }, words.discard);
  button.addEventListener("keydown", (event) => event.repeat && event.preventDefault());
  button.addEventListener("click", () => {
    if (button.className) return discard();
    button.className = "warn";
    button.textContent = words.reallyDiscard;
  });
  return button;
}
