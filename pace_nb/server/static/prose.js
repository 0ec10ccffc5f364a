// A model's text as elements: paragraphs, headings, code. Text of a model is anyone's text, so it
// only ever becomes text nodes: no HTML, no links, no images, whatever it says.

const FENCE = /^\s*(```|~~~)/;
const INLINE = /(`[^`\n]+`|\*\*[^*\n]+\*\*)/;

/** Replace what `parent` holds by `text`. */
export function write(parent, text) {
  parent.replaceChildren(...blocks(text));
}

function blocks(text) {
  const found = [];
  let paragraph = [];
  let code = null; // lines of an open fence
  let fence = "";
  const flush = () => {
    if (paragraph.length) found.push(element("p", inline(paragraph.join("\n"))));
    paragraph = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1];
    if (code) {
      if (mark === fence) {
        found.push(codeBlock(code));
        code = null;
      } else code.push(line);
    } else if (mark) {
      flush();
      code = [];
      fence = mark;
    } else if (/^#{1,6} /.test(line)) {
      flush();
      found.push(element("p", inline(line.replace(/^#+ /, "")), "heading"));
    } else if (line.trim()) paragraph.push(line);
    else flush();
  }
  flush();
  if (code) found.push(codeBlock(code));
  return found;
}

function inline(text) {
  return text.split(INLINE).map((part, i) => {
    if (i % 2 === 0) return part;
    return part[0] === "`"
      ? element("code", [part.slice(1, -1)])
      : element("strong", [part.slice(2, -2)]);
  });
}

function codeBlock(lines) {
  const block = element("pre", [element("code", [lines.join("\n")])]);
  block.tabIndex = 0; // to be scrolled by keyboard
  return block;
}

/** A new element with these children; strings become text nodes. */
export function element(name, children = [], className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
