// Makes elements. Text becomes text nodes only: nothing that a model wrote is read as HTML.

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// A line that begins a block of code, perhaps in a list: what comes before the mark, the mark, and the language.
const FENCE = /^([ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}(?=[^`]*$)|~{3,})([^\n]*)/;

// Markdown with each character that a model wrote, but for the marks that begin and end a block of code: such blocks, code
// in lines, bold words and headings are set off.
export function formatted(text) {
  const shown = element("div", { class: "text", dir: "auto" });
  const lines = text.match(/[^\n]*\n|[^\n]+$/g) ?? [];
  let plain = "";
  for (let place = 0; place < lines.length; place += 1) {
    const [, before, mark, language] = FENCE.exec(lines[place]) ?? [];
    if (!mark) {
      plain += lines[place];
      continue;
    }
    const length = lines.slice(place + 1).findIndex((line) => isEnd(line, mark));
    const end = length < 0 ? lines.length : place + 1 + length;
    inline(shown, before.trim() ? plain + before : plain);
    shown.append(block(language, lines.slice(place + 1, end).join("")));
    plain = "";
    place = end;
  }
  inline(shown, plain);
  return shown;
}

function isEnd(line, mark) {
  const found = line.trim();
  return found.length >= mark.length && found === mark[0].repeat(found.length);
}

function block(language, code) {
  const caption = language.trim() ? [element("p", { class: "caption", dir: "auto" }, language)] : [];
  const pre = element("pre", { dir: "ltr", tabindex: "0" }, element("code", {}, code));
  return element("div", { class: "block" }, ...caption, pre);
}

function inline(parent, text) {
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*|^#{1,6} [^\n]+$)/m)) {
    if (/^`[^`\n]+`$/.test(piece)) parent.append(element("code", { dir: "ltr" }, piece));
    else if (/^\*\*[^*\n]+\*\*$/.test(piece)) parent.append(element("strong", {}, piece));
    else if (/^#{1,6} /.test(piece)) parent.append(element("strong", { class: "heading" }, piece));
    else if (piece) parent.append(piece);
  }
}
