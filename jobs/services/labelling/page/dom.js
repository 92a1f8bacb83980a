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

// Markdown as far as it can be shown without changing a character: blocks of code, code in lines, bold headings.
export function formatted(text) {
  const shown = element("div", { class: "text", dir: "auto" });
  const parts = text.split(/^(```[^\n]*\n[\s\S]*?(?:^```[ \t]*$\n?|$(?![\s\S])))/m);
  for (const part of parts) {
    if (part.startsWith("```")) {
      const code = part.replace(/^```[^\n]*\n/, "").replace(/\n?```[ \t]*\n?$/, "");
      shown.append(element("pre", { dir: "ltr", tabindex: "0" }, element("code", {}, code)));
    } else {
      inline(shown, part);
    }
  }
  return shown;
}

function inline(parent, text) {
  for (const piece of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*|^#{1,6} [^\n]+$)/m)) {
    if (/^`[^`\n]+`$/.test(piece)) parent.append(element("code", { dir: "ltr" }, piece.slice(1, -1)));
    else if (/^\*\*[^*\n]+\*\*$/.test(piece)) parent.append(element("strong", {}, piece.slice(2, -2)));
    else if (/^#{1,6} /.test(piece)) parent.append(element("strong", { class: "heading" }, piece));
    else if (piece) parent.append(piece);
  }
}
