// Text of an answer, which grows: nodes are made, HTML is never parsed.
"use strict";
(() => {
  // What is longer than this without an end of a paragraph is shown in pieces.
  const MOST_TAIL = 4000;
  const MOST_BLOCKS = 50;

  function make(tag, text = "", className = "") {
    const made = document.createElement(tag);
    made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // Whole paragraphs are marked up once; what is behind the last one is one text node that grows with each frame.
  class Prose {
    constructor(box, isMarked = true) {
      Object.assign(this, { box, isMarked, tail: "", text: "", shown: 0, waits: false });
      this.node = document.createTextNode("");
      this.last = make("p");
      this.last.append(this.node);
      this.part = make("div");
      box.append(this.part, this.last);
    }
    // Blocks stand in parts of a bounded size: those out of sight cost nothing.
    put(text) {
      if (this.part.children.length >= MOST_BLOCKS) this.last.before(this.part = make("div"));
      this.part.append(this.isMarked ? block(text) : make("p", text.trim()));
    }
    add(text) {
      this.text += text;
      this.tail += text;
      if (this.waits) return;
      this.waits = true;
      requestAnimationFrame(() => { this.waits = false; this.paint(); });
    }
    paint() {
      const follows = innerHeight + scrollY >= document.documentElement.scrollHeight - 48;
      for (let end = endOfBlock(this.tail); end; end = endOfBlock(this.tail)) {
        this.put(this.tail.slice(0, end));
        this.tail = this.tail.slice(end);
        this.node.data = "";
        this.shown = 0;
      }
      if (this.shown < this.tail.length) {
        this.node.appendData(this.tail.slice(this.shown));
        this.shown = this.tail.length;
      }
      this.box.scrollTop = this.box.scrollHeight;
      if (follows) scrollTo(0, document.documentElement.scrollHeight);
    }
    end() {
      this.paint();
      if (this.tail.trim()) this.put(this.tail);
      this.last.remove();
      this.tail = "";
    }
  }

  function endOfBlock(text) {
    if (text.startsWith("```")) {
      const end = /\n```[^\S\n]*\n/.exec(text);
      return end ? end.index + end[0].length : 0;
    }
    const end = text.indexOf("\n\n");
    const code = text.slice(0, end < 0 ? text.length : end).indexOf("\n```");
    if (code >= 0) return code + 1;
    if (end >= 0) return end + 2;
    return text.length > MOST_TAIL ? text.lastIndexOf("\n") + 1 || MOST_TAIL : 0;
  }

  // A subset of Markdown: blocks of code, headings, code, bold. Links stay text.
  function block(text) {
    const code = /^```[^\n]*\n([^]*?)(?:\n```\s*)?$/.exec(text);
    if (code) {
      const pre = make("pre");
      pre.tabIndex = 0;
      pre.append(make("code", code[1]));
      return pre;
    }
    const heading = /^#{1,6} ([^\n]+)\s*$/.exec(text);
    const made = make(heading ? "h4" : "p");
    const plain = heading ? heading[1] : text.replace(/^\n+|\s+$/g, "");
    for (const part of plain.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (part.length > 2 && part[0] === "`") made.append(make("code", part.slice(1, -1)));
      else if (part.length > 4 && part.startsWith("**")) made.append(make("strong", part.slice(2, -2)));
      else made.append(part);
    }
    return made;
  }

  window.tryText = { make, Prose };
})();
