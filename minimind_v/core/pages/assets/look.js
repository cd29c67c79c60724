// The viewer of a trace: an answer, where each of its tokens comes from, and what the model makes of each patch.
//
//   mount(element, trace, { ask, language })
//
// `trace` is what `mmv look --json` prints. `ask({ occlude, answer })`, if there is one, returns the trace of the same
// answer with the patches `occlude` ([[image, patch], …]) painted grey; it has an `answer` where that of the trace was
// given, else the model's own is meant. `language` is "en" or "zh".

const greyed = (block) => (block > 1 ? `this block of ${block} × ${block} patches is` : "this patch is");
const greyedZh = (block) => (block > 1 ? `这 ${block} × ${block} 个图块` : "这个图块");

const TEXTS = {
  en: {
    question: "Question",
    answer: "Answer",
    colours: "Colour: bits that the image gives to a token",
    coloursLost: "Colour: bits that a token loses with the grey patches",
    less: "less likely with the image",
    range: (bits) => `0 – ${bits} bits or more`,
    end: "end",
    hint: "Arrow keys choose a patch, Enter keeps it.",
    hintPaint: "Arrow keys choose a patch, Enter keeps it, Space paints it grey.",
    keep: "Point at a token or a patch; a click or Enter keeps it.",
    drag: "Drag over the image to paint patches grey: the model answers again.",
    noPaint: "To paint patches grey and ask again, open this answer in the page of mmv web.",
    onePaint: "Double-click a patch to see what the answer loses without it. To paint freely, use mmv web.",
    paint: "Paint",
    clear: "Clear",
    asking: "The model answers …",
    notAsked: "–",
    nothing: "(nothing)",
    image: (n, of) => (of > 1 ? `Image ${n} of ${of}` : "The image as the model receives it"),
    grid: (n, rows, columns) => `Image ${n}: ${rows} × ${columns} patches`,
    map: "Map",
    attention: "Attention",
    rollout: "Attention rollout",
    occlusion: "Bits lost when grey",
    noMap: "Image only",
    layer: "Layer",
    head: "Head",
    all: "all",
    nth: (n) => `${n}`,
    none: "0",
    inBits: (bits) => `${bits} bits`,
    wholeAnswer: "Whole answer",
    token: "Token",
    probability: (p) => `probability ${p}`,
    bitsLine: (bits, blank) => `${bits} bits of surprise with the image, ${blank} with a grey one`,
    gain: (bits) => `The image gives ${bits} bits`,
    costs: (bits) => `The image costs ${bits} bits`,
    total: (bits) => `The image gives ${bits} bits to this answer`,
    toImage: (share) => `${share} of the attention goes to the image, the rest to the text`,
    rivals: "Rivals",
    heads: "Each layer and head:",
    headsHint: "one row for each layer, one column for each head",
    patch: "Patch",
    patchAt: (n, row, column, of) => `Patch in row ${row}, column ${column}${of > 1 ? ` of image ${n}` : ""}`,
    words: "Nearest words",
    lens: "What each layer would say next",
    attends: "Tokens that attend to it most",
    lostHere: (bits, block) => `When ${greyed(block)} grey, the answer loses ${bits} bits`,
    gainsHere: (bits, block) => `When ${greyed(block)} grey, the answer gains ${bits} bits`,
    pickPatch: "Point at a patch of the image.",
    others: "The same question with other images",
    now: "as it is",
    blank: "grey image",
    mirrored: "mirrored image",
    rotated: "images in another order",
    another: "another image",
    painted: "patches painted grey",
    shown: "Image",
    itsAnswer: "The model's answer",
    change: "Bits of the answer above",
    tables: "The numbers as tables",
    tokens: "Tokens",
    patches: "Patches",
    withImage: "bits",
    withBlank: "bits, grey image",
    fromImage: "from the image",
    lastLayer: "last layer",
    how: "How to read this",
    help: [
      ["Colour of a token", "How much less surprising the image makes the token, in bits: −log₂ of its probability with a grey image, minus that with the image, each time after the same tokens before it. This is a measured effect: the image was replaced and the model computed again. One bit doubles the probability."],
      ["Heat map", "Attention weights: how much the position that predicts the token reads from each patch. Attention is not an explanation. A weight says nothing about what was read, and in later layers a patch's position also holds what it has read from other positions. Rollout multiplies the layers together; it ignores everything but attention."],
      ["Bits lost when grey", "Measured as well: each patch is painted grey in turn, and the answer is computed again. But a grey square is itself an unusual image, and two patches that show the same thing can stand in for each other."],
      ["Nearest words", "The words whose embeddings point most nearly in the direction of the patch, with the cosine. 1 is the same direction; below 0.3 the patch is hardly like any word, which is common: the model learns what a patch means, not to spell it."],
      ["What each layer would say next", "The state behind each layer, sent through the final norm and the head (the logit lens). Only the last layer was trained to be read like this."],
    ],
  },
  zh: {
    question: "问题",
    answer: "回答",
    colours: "颜色：图片给这个词元带来的信息（比特）",
    coloursLost: "颜色：图块变灰后，这个词元失去的比特",
    less: "有图片时反而更不可能",
    range: (bits) => `0 – ${bits} 比特或更多`,
    end: "结束",
    hint: "方向键选择图块，回车键固定。",
    hintPaint: "方向键选择图块，回车键固定，空格键涂灰。",
    keep: "指向词元或图块查看，点击或回车固定。",
    drag: "在图片上拖动，把图块涂灰：模型会重新回答。",
    noPaint: "想涂灰图块并重新提问，请在 mmv web 的页面里打开这个回答。",
    onePaint: "双击一个图块，看看没有它时回答会失去什么。想随意涂抹，请用 mmv web。",
    paint: "涂抹",
    clear: "清除",
    asking: "模型正在回答……",
    notAsked: "–",
    nothing: "（没有内容）",
    image: (n, of) => (of > 1 ? `第 ${n} 张图片，共 ${of} 张` : "模型收到的图片"),
    grid: (n, rows, columns) => `第 ${n} 张图片：${rows} × ${columns} 个图块`,
    map: "显示",
    attention: "注意力",
    rollout: "注意力汇总（rollout）",
    occlusion: "变灰后失去的比特",
    noMap: "只看图片",
    layer: "层",
    head: "头",
    all: "全部",
    nth: (n) => `第 ${n}`,
    none: "0",
    inBits: (bits) => `${bits} 比特`,
    wholeAnswer: "整个回答",
    token: "词元",
    probability: (p) => `概率 ${p}`,
    bitsLine: (bits, blank) => `有图片时意外程度 ${bits} 比特，换成灰色图片时 ${blank} 比特`,
    gain: (bits) => `图片带来 ${bits} 比特`,
    costs: (bits) => `图片反而多出 ${bits} 比特的意外`,
    total: (bits) => `图片给这个回答带来 ${bits} 比特`,
    toImage: (share) => `注意力有 ${share} 落在图片上，其余落在文字上`,
    rivals: "其他候选",
    heads: "每一层、每个头：",
    headsHint: "每行一层，每列一个头",
    patch: "图块",
    patchAt: (n, row, column, of) => `${of > 1 ? `第 ${n} 张图片，` : ""}第 ${row} 行第 ${column} 列的图块`,
    words: "最接近的词",
    lens: "每一层接下来会说什么",
    attends: "最关注它的词元",
    lostHere: (bits, block) => `${greyedZh(block)}变灰时，回答失去 ${bits} 比特`,
    gainsHere: (bits, block) => `${greyedZh(block)}变灰时，回答反而多得 ${bits} 比特`,
    pickPatch: "请指向图片上的一个图块。",
    others: "同一个问题，换一张图片",
    now: "原图",
    blank: "灰色图片",
    mirrored: "左右翻转的图片",
    rotated: "图片换了次序",
    another: "另一张图片",
    painted: "部分图块涂灰",
    shown: "图片",
    itsAnswer: "模型的回答",
    change: "上面那个回答的比特",
    tables: "以表格查看数字",
    tokens: "词元",
    patches: "图块",
    withImage: "比特",
    withBlank: "灰色图片时的比特",
    fromImage: "来自图片",
    lastLayer: "最后一层",
    how: "怎样读这些图",
    help: [
      ["词元的颜色", "图片让这个词元少了多少意外，单位是比特：换成灰色图片时的 −log₂ 概率，减去有图片时的；两次前面的词元都相同。这是实测的影响：换掉图片，让模型重新算一遍。一比特等于概率翻一倍。"],
      ["热力图", "注意力权重：预测这个词元的位置从每个图块读取多少。注意力不是解释：权重没有说明读到了什么；到了后面的层，一个图块的位置上还含有它从别处读来的内容。汇总（rollout）把各层相乘，除注意力外什么都不考虑。"],
      ["变灰后失去的比特", "这也是实测的：依次把每个图块涂灰，重新计算回答。不过灰色方块本身就是少见的图片，而且两个内容相同的图块可以互相替代。"],
      ["最接近的词", "词向量的方向与图块最接近的词，以及余弦相似度。1 表示方向相同；低于 0.3 说明图块几乎不像任何词，这很常见：模型学会的是图块的含义，而不是把它拼写出来。"],
      ["每一层接下来会说什么", "把每一层之后的状态送进最后的归一化和输出头（logit lens）。只有最后一层是按这种读法训练的。"],
    ],
  },
};

// Inferno (van der Walt & Smith, 2015): equal steps look equally far apart, also in grey.
const INFERNO = ["000004", "1b0c42", "4b0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9a06", "f7d03c", "fcffa4"]
  .map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const VEIL = [0.4, 0.8]; // of the heat over the image: where it is least, and most
const FULL = 8; // bits of the strongest colour of a token
const LEAST = 0.5; // bits that have the strongest colour of a map: a map of less would show differences that mean nothing
const GREY = "#808080";
const WAIT = 180; // milliseconds from the last painted patch until the model is asked

const clamp = (value, low = 0, high = 1) => Math.min(high, Math.max(low, value));
const sum = (values) => values.reduce((total, value) => total + value, 0);
const percent = (value) => (value >= 0.9995 ? "100 %" : value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`);
const number = (value, digits = 1) => {
  const text = Math.abs(value).toFixed(Math.abs(value) < 10 && digits < 2 ? 2 : digits);
  return (value < 0 && Number(text) ? "−" : "") + text;
};
const signed = (value) => (Number(Math.abs(value).toFixed(2)) && value > 0 ? "+" : "") + number(value);
const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);

/** A token as it is shown: spaces and line breaks can be seen. */
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));

function inferno(value) {
  const at = clamp(value) * (INFERNO.length - 1);
  const low = Math.min(Math.floor(at), INFERNO.length - 2);
  return INFERNO[low].map((from, index) => from + (INFERNO[low + 1][index] - from) * (at - low));
}

/** An element: properties, `on…` listeners, `aria…` and other attributes, and children. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Numbers of a trace, by token t, layer l, head h and patch p (counted through all images). */
class Numbers {
  constructor(trace) {
    const { layers, heads, patches, scale, data, peaks } = trace.attention;
    Object.assign(this, { layers, heads, patches, scale, T: trace.tokens.length });
    this.levels = bytes(data);
    this.peaks = floats(peaks);
    this.rollout = floats(trace.rollout);
    this.occlusion = trace.occlusion && floats(trace.occlusion.bits);
  }

  /** Attention of a token to all patches: of one layer and head, or the mean over all where they are null. */
  attention(t, layer, head) {
    const weights = new Float32Array(this.patches);
    const all = (count, chosen) => (chosen === null ? [...Array(count).keys()] : [chosen]);
    const [layers, heads] = [all(this.layers, layer), all(this.heads, head)];
    for (const l of layers) {
      for (const each of heads) {
        const row = (t * this.layers + l) * this.heads + each;
        const factor = (this.scale * this.peaks[row]) / (layers.length * heads.length);
        for (let p = 0; p < this.patches; p++) weights[p] += this.levels[row * this.patches + p] * factor;
      }
    }
    return weights;
  }

  row(array, t) {
    return array.subarray(t * this.patches, (t + 1) * this.patches);
  }

  /** What the map shows for a token, or for the whole answer where t is null: its mean, or the sum of bits. */
  map({ source, layer, head }, t) {
    const of = (at) => {
      if (source === "attention") return this.attention(at, layer, head);
      return this.row(source === "rollout" ? this.rollout : this.occlusion, at);
    };
    if (t !== null) return of(t);
    const total = new Float32Array(this.patches);
    for (let at = 0; at < this.T; at++) of(at).forEach((value, p) => { total[p] += value; });
    return source === "occlusion" ? total : total.map((value) => value / this.T);
  }

  /** The bits that each token loses when the block of a patch is grey. */
  lost(p) {
    return Array.from({ length: this.T }, (_, t) => this.occlusion[t * this.patches + p]);
  }
}

/** Show a trace in an element. Returns a function that ends it. */
export function mount(element, trace, { ask = null, language = "en" } = {}) {
  const viewer = new Viewer(trace, ask, TEXTS[language.startsWith("zh") ? "zh" : "en"]);
  viewer.root.lang = language;
  element.replaceChildren(viewer.root);
  viewer.resize();
  return () => viewer.end();
}

class Viewer {
  constructor(trace, ask, texts) {
    Object.assign(this, { trace, ask, texts, numbers: new Numbers(trace) });
    this.source = "attention";
    this.layer = this.head = null;
    this.token = this.keptToken = null; // shown now, and while nothing is pointed at; null: the whole answer
    this.patch = this.keptPatch = null;
    this.painted = new Set(); // patches, counted through all images
    this.result = null; // the trace with painted patches
    this.asked = 0;
    this.firsts = trace.images.reduce((firsts, image) => [...firsts, firsts.at(-1) + image.rows * image.columns], [0]);
    this.gains = trace.tokens.map((token) => token.bits_blank - token.bits);
    this.root = h("div", { class: "mmv-look" });
    this.status = h("div", { class: "unseen", "aria-live": "polite" });
    this.build();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.root);
    this.show();
  }

  end() {
    this.observer.disconnect();
    clearTimeout(this.timer);
    this.asked++;
    this.root.remove();
  }

  // --- what stands on the page ----------------------------------------------------------------------------------------

  build() {
    const { texts: t, trace } = this;
    this.chips = trace.tokens.map((token, index) => this.chip(token, index));
    this.legend = h("p", { class: "legend" });
    this.answer = h("div", { class: "answer", role: "group", "aria-label": t.answer, onkeydown: (event) => this.tokenKey(event) },
      this.chips);
    this.views = trace.images.map((image, index) => this.view(image, index));
    this.tokenCard = h("section", { class: "card token" });
    this.patchCard = h("section", { class: "card patch" });
    this.others = h("section", { class: "card others" });
    this.root.append(
      this.status,
      h("div", { class: "talk" },
        h("p", { class: "question" }, h("b", {}, t.question), trace.question),
        h("p", { class: "name" }, t.answer), this.answer, this.legend),
      h("div", { class: "stage" },
        h("div", { class: trace.images.length > 1 ? "images several" : "images" }, this.controls(), this.views.map((view) => view.figure), this.scale = h("div", { class: "scale" }),
          this.note = h("div", { class: "note" })),
        h("div", { class: "cards" }, this.tokenCard, this.patchCard)),
      this.others,
      h("details", { class: "card" }, h("summary", {}, t.how),
        h("dl", { class: "help" }, t.help.map(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]))),
      this.tables());
    this.root.addEventListener("pointerup", () => this.endStroke());
    this.root.addEventListener("pointercancel", () => { this.stroke = null; }); // a finger scrolls the page
  }

  chip(token, index) {
    const isEnd = /^<\|.*\|>$/.test(token.text);
    return h("button", {
      type: "button", class: isEnd ? "chip end" : /^\s/.test(token.text) ? "chip spaced" : "chip", tabindex: index ? -1 : 0, "data-token": index,
      onpointerenter: (event) => event.pointerType === "mouse" && this.point({ token: index }),
      onpointerleave: (event) => event.pointerType === "mouse" && this.point({ token: this.keptToken }),
      onfocus: () => this.point({ token: index }),
      onblur: () => this.point({ token: this.keptToken }),
      onclick: () => this.keep({ token: this.keptToken === index ? null : index }),
    }, isEnd ? this.texts.end : visible(token.text.replace(/^ /, "")) || "·");
  }

  view(image, index) {
    const { texts: t, trace } = this;
    const canvas = h("canvas");
    const picture = new Image();
    const view = { image, index, canvas, picture, first: this.firsts[index] };
    picture.addEventListener("load", () => this.draw());
    picture.src = image.src;
    const on = (event) => this.patchAt(view, event);
    view.pad = h("div", {
      class: "pad", tabindex: 0, role: "group", "aria-roledescription": t.grid(index + 1, image.rows, image.columns),
      "aria-label": `${t.grid(index + 1, image.rows, image.columns)}. ${this.canPaint ? t.hintPaint : t.hint}`,
      onpointermove: (event) => this.moved(event, on(event)),
      onpointerdown: (event) => this.pressed(event, on(event)),
      onpointerleave: (event) => event.pointerType === "mouse" && !this.stroke && this.point({ patch: this.keptPatch }),
      ondblclick: (event) => !this.ask && this.paint(on(event)),
      onkeydown: (event) => this.patchKey(event, view),
      onblur: () => this.point({ patch: this.keptPatch }),
    }, canvas);
    view.figure = h("figure", {}, view.pad, h("figcaption", {}, t.image(index + 1, trace.images.length)));
    return view;
  }

  get canPaint() {
    return Boolean(this.ask || this.numbers.occlusion);
  }

  controls() {
    const { texts: t, numbers } = this;
    const select = (name, choices, change) => h("label", {}, h("span", {}, name),
      h("select", { onchange: (event) => { change(event.target.value); this.show(); } },
        choices.map(([value, text]) => h("option", { value }, text))));
    const sources = [["attention", t.attention], ["rollout", t.rollout], ...(numbers.occlusion ? [["occlusion", t.occlusion]] : []), ["none", t.noMap]];
    const counted = (count) => [["", t.all], ...Array.from({ length: count }, (_, n) => [n, t.nth(n + 1)])];
    const chosen = (value) => (value === "" ? null : Number(value));
    this.sourceLabel = select(t.map, sources, (value) => { this.source = value; });
    this.layerLabel = select(t.layer, counted(numbers.layers), (value) => { this.layer = chosen(value); });
    this.headLabel = select(t.head, counted(numbers.heads), (value) => { this.head = chosen(value); });
    this.brush = h("button", { type: "button", class: "brush", "aria-pressed": "false", onclick: () => {
      const on = this.brush.getAttribute("aria-pressed") !== "true";
      this.brush.setAttribute("aria-pressed", on);
      this.root.classList.toggle("painting", on);
    } }, t.paint);
    this.eraser = h("button", { type: "button", hidden: true, onclick: () => this.clear() }, t.clear);
    return h("div", { class: "controls" }, this.sourceLabel, this.layerLabel, this.headLabel, this.ask && this.brush, this.eraser);
  }

  // --- what is pointed at ---------------------------------------------------------------------------------------------

  point(change) {
    if (Object.entries(change).every(([name, value]) => this[name] === value)) return;
    Object.assign(this, change);
    this.show();
  }

  keep({ token, patch }) {
    if (token !== undefined) this.keptToken = this.token = token;
    if (patch !== undefined) this.keptPatch = this.patch = patch;
    this.show();
  }

  tokenKey(event) {
    const at = Number(event.target.dataset?.token);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? this.chips.length - 1 : at + step;
    if (!(next >= 0 && next < this.chips.length)) return;
    event.preventDefault();
    this.chips[at].tabIndex = -1;
    this.chips[next].tabIndex = 0;
    this.chips[next].focus();
  }

  patchKey(event, { image, first }) {
    const { rows, columns } = image;
    const inside = this.patch !== null && this.patch >= first && this.patch < first + rows * columns;
    const at = inside ? this.patch - first : 0;
    const [dy, dx] = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1] }[event.key] ?? [];
    if (event.key === " ") {
      event.preventDefault();
      this.paint(first + at);
      this.asks();
    } else if (event.key === "Enter") this.keep({ patch: this.keptPatch === first + at ? null : first + at });
    else if (dy !== undefined) {
      event.preventDefault();
      const row = inside ? clamp(Math.floor(at / columns) + dy, 0, rows - 1) : 0;
      const column = inside ? clamp((at % columns) + dx, 0, columns - 1) : 0;
      this.point({ patch: first + row * columns + column });
      const { words, layers } = this.trace.patches[this.patch];
      this.status.textContent = `${this.patchName(this.patch)}: ${words.map((word) => word.text).join(", ")}; ${layers.at(-1).text}`;
    }
  }

  patchAt({ canvas, image, first }, event) {
    const box = canvas.getBoundingClientRect();
    const along = (position, start, size, count) => clamp(Math.floor(((position - start) / size) * count), 0, count - 1);
    return first + along(event.clientY, box.top, box.height, image.rows) * image.columns + along(event.clientX, box.left, box.width, image.columns);
  }

  patchName(p) {
    const n = this.firsts.findLastIndex((first) => first <= p);
    const { columns } = this.trace.images[n];
    const at = p - this.firsts[n];
    return this.texts.patchAt(n + 1, Math.floor(at / columns) + 1, (at % columns) + 1, this.trace.images.length);
  }

  // --- painting -------------------------------------------------------------------------------------------------------

  pressed(event, p) {
    if (event.button) return;
    const paints = this.ask && (event.pointerType === "mouse" || this.brush.getAttribute("aria-pressed") === "true");
    this.stroke = { start: p, paints, begun: false, erases: this.painted.has(p) };
    if (paints) event.currentTarget.setPointerCapture(event.pointerId);
    if (event.pointerType !== "mouse") this.point({ patch: p });
  }

  moved(event, p) {
    if (this.stroke?.paints && p !== this.stroke.start && !this.stroke.begun) {
      this.stroke.begun = true;
      this.paint(this.stroke.start, !this.stroke.erases);
    }
    if (this.stroke?.begun) this.paint(p, !this.stroke.erases);
    if (event.pointerType === "mouse" || this.stroke) this.point({ patch: p });
  }

  endStroke() {
    const { stroke } = this;
    this.stroke = null;
    if (!stroke) return;
    if (stroke.begun) this.asks();
    else if (stroke.paints && this.brush.getAttribute("aria-pressed") === "true") {
      this.paint(stroke.start);
      this.asks();
    } else this.keep({ patch: this.keptPatch === stroke.start ? null : stroke.start });
  }

  paint(p, on = !this.painted.has(p)) {
    if (!this.canPaint) return;
    if (!this.ask) { // the map of the file knows one block at a time
      const block = this.blockOf(p);
      const was = block.every((each) => this.painted.has(each)) && this.painted.size === block.length;
      this.painted = new Set(was ? [] : block);
    } else if (on) this.painted.add(p);
    else this.painted.delete(p);
    this.show();
  }

  /** The patches that the occlusion map painted together with this one. */
  blockOf(p) {
    const n = this.firsts.findLastIndex((first) => first <= p);
    const { rows, columns } = this.trace.images[n];
    const { block } = this.trace.occlusion;
    const top = Math.floor(Math.floor((p - this.firsts[n]) / columns) / block) * block;
    const left = Math.floor(((p - this.firsts[n]) % columns) / block) * block;
    const patches = [];
    for (let row = top; row < Math.min(rows, top + block); row++) {
      for (let column = left; column < Math.min(columns, left + block); column++) patches.push(this.firsts[n] + row * columns + column);
    }
    return patches;
  }

  clear() {
    clearTimeout(this.timer);
    this.painted.clear();
    this.result = this.problem = null;
    this.asked++;
    this.busy = false;
    this.show();
  }

  /** Ask the model again, once the hand rests. An answer that comes after a later question is dropped. */
  asks() {
    clearTimeout(this.timer);
    if (!this.ask) return;
    if (!this.painted.size) { this.clear(); return; }
    const turn = ++this.asked;
    this.busy = true;
    this.result = this.problem = null;
    this.show();
    this.timer = setTimeout(async () => {
      try {
        const occlude = [...this.painted].sort((a, b) => a - b).map((p) => {
          const n = this.firsts.findLastIndex((first) => first <= p);
          return [n, p - this.firsts[n]];
        });
        const result = await this.ask(this.trace.given ? { occlude, answer: this.trace.answer } : { occlude });
        if (turn !== this.asked) return;
        this.result = result;
        this.status.textContent = `${this.texts.painted}: ${result.variants.occluded?.answer ?? result.answer}`;
      } catch (error) {
        if (turn !== this.asked) return;
        this.problem = error.message;
      }
      this.busy = false;
      this.show();
    }, WAIT);
  }

  /** The bits that each token loses with the painted patches, where they are known. */
  get lost() {
    if (!this.painted.size) return null;
    if (!this.ask) return this.numbers.lost(this.painted.values().next().value);
    const bits = this.result?.answer === this.trace.answer && this.result.variants.occluded?.bits;
    return bits?.length === this.trace.tokens.length ? bits.map((value, t) => value - this.trace.tokens[t].bits) : null;
  }

  /** The bits that the whole answer loses; known also where its tokens are others than before. */
  get lostInAll() {
    if (this.ask && this.result?.answer === this.trace.answer && this.result.variants.occluded) {
      return sum(this.result.variants.occluded.bits) - sum(this.result.tokens.map((token) => token.bits));
    }
    return this.lost && sum(this.lost);
  }

  // --- showing --------------------------------------------------------------------------------------------------------

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      this.showChips();
      this.showControls();
      this.showToken();
      this.showPatch();
      this.showOthers();
      this.draw();
    });
  }

  showChips() {
    const { texts: t, lost } = this;
    const values = lost ?? this.gains;
    const attends = this.patch === null ? null : this.trace.tokens.map((_, at) => this.weight(at)[this.patch]);
    const most = attends && Math.max(...attends, 1e-9);
    this.chips.forEach((chip, at) => {
      chip.style.setProperty("--gain", `${Math.round(100 * clamp(values[at] / FULL))}%`);
      chip.style.setProperty("--loss", `${Math.round(100 * clamp(-values[at] / FULL))}%`);
      chip.style.setProperty("--reads", attends ? (attends[at] / most).toFixed(3) : 0);
      chip.classList.toggle("strong", Math.abs(values[at]) > 0.55 * FULL);
      chip.classList.toggle("lit", this.token === at);
      chip.setAttribute("aria-pressed", this.keptToken === at);
      const token = this.trace.tokens[at];
      chip.setAttribute("aria-label", `${visible(token.text)}, ${t.probability(percent(token.probability))}, ${t.gain(number(this.gains[at]))}`);
    });
    this.legend.replaceChildren(lost ? t.coloursLost : t.colours, h("span", { class: "ramp" }), t.range(FULL),
      values.some((value) => value < -0.05 * FULL) && !lost ? [h("span", { class: "ramp less" }), t.less] : "");
  }

  /** Weights of a token for "which tokens attend to this patch": those of the map, or attention where it shows none. */
  weight(t) {
    if (this.source === "rollout") return this.numbers.row(this.numbers.rollout, t);
    return this.numbers.attention(t, this.layer, this.head);
  }

  showControls() {
    const { texts: t } = this;
    for (const label of [this.layerLabel, this.headLabel]) label.classList.toggle("off", this.source !== "attention");
    this.layerLabel.lastChild.value = this.layer ?? "";
    this.headLabel.lastChild.value = this.head ?? "";
    this.eraser.hidden = !this.painted.size;
    const [before, ...after] = (this.ask ? t.drag : this.numbers.occlusion ? t.onePaint : t.noPaint).split("mmv web");
    this.note.replaceChildren(t.keep, " ", before, ...after.flatMap((text) => [h("code", {}, "mmv web"), text]));
  }

  showToken() {
    const { texts: t, trace, token: at } = this;
    if (at === null) {
      this.tokenCard.replaceChildren(h("h3", {}, t.wholeAnswer), h("p", { class: "big" }, t.total(number(sum(this.gains)))),
        ...this.minis());
      return;
    }
    const token = trace.tokens[at];
    const gain = this.gains[at];
    const most = Math.max(token.probability, token.rivals[0]?.probability ?? 0, 1e-9);
    const bar = (text, probability, own) => h("li", { class: own ? "own" : null, "--value": clamp(probability / most).toFixed(4) },
      h("span", { class: "word" }, visible(text)), h("span", { class: "bar" }), h("span", { class: "value" }, percent(probability)));
    const share = sum([...this.numbers.attention(at, this.layer, this.head)]);
    this.tokenCard.replaceChildren(
      h("h3", {}, t.token, " ", h("code", {}, visible(token.text))),
      h("p", { class: "big" }, gain >= 0 ? t.gain(number(gain)) : t.costs(number(-gain))),
      h("p", { class: "dim" }, t.bitsLine(number(token.bits, 2), number(token.bits_blank, 2))),
      h("ol", { class: "bars", "aria-label": t.rivals }, bar(token.text, token.probability, true), token.rivals.map((rival) => bar(rival.text, rival.probability))),
      h("p", { class: "dim" }, t.toImage(percent(share))),
      ...this.minis());
  }

  /** A small map for each layer and head; a click chooses it. */
  minis() {
    const { texts: t, numbers } = this;
    if (this.source !== "attention") return [];
    if (!this.miniCells) {
      this.miniCells = [];
      this.miniGrid = h("div", { class: "minis", "aria-hidden": "true", "--heads": numbers.heads });
      for (let layer = 0; layer < numbers.layers; layer++) {
        for (let head = 0; head < numbers.heads; head++) {
          const canvas = h("canvas", { title: `${t.layer} ${layer + 1}, ${t.head} ${head + 1}`, onclick: () => {
            const same = this.layer === layer && this.head === head;
            [this.layer, this.head] = same ? [null, null] : [layer, head];
            this.show();
          } });
          this.miniCells.push({ canvas, layer, head });
        }
      }
      this.miniGrid.append(...this.miniCells.map(({ canvas }) => canvas));
    }
    const { rows, columns } = this.trace.images[0];
    const maps = this.miniCells.map(({ layer, head }) => numbers.map({ source: "attention", layer, head }, this.token));
    this.miniCells.forEach(({ canvas, layer, head }, index) => {
      canvas.width = columns * this.trace.images.length;
      canvas.height = rows;
      const most = Math.max(...maps[index], 1e-9);
      this.trace.images.forEach((image, n) => canvas.getContext("2d").putImageData(
        heat(maps[index].subarray(this.firsts[n], this.firsts[n + 1]), image, most, [1, 1]), n * columns, 0));
      canvas.classList.toggle("chosen", (this.layer === null || this.layer === layer) && (this.head === null || this.head === head) && (this.layer ?? this.head) !== null);
    });
    return [h("h4", {}, t.heads, " ", h("small", {}, t.headsHint)), this.miniGrid];
  }

  showPatch() {
    const { texts: t, trace, patch: p } = this;
    if (p === null) {
      this.patchCard.replaceChildren(h("h3", {}, t.patch), h("p", { class: "dim" }, t.pickPatch));
      return;
    }
    const { words, layers } = trace.patches[p];
    const bar = (text, value, shown, name) => h("li", { "--value": clamp(value).toFixed(4) }, name && h("span", { class: "nth" }, name),
      h("span", { class: "word" }, visible(text)), h("span", { class: "bar" }), h("span", { class: "value" }, shown));
    const readers = trace.tokens.map((token, at) => [this.weight(at)[p], token.text])
      .sort(([a], [b]) => b - a).slice(0, 5).filter(([weight]) => weight > 1e-4);
    const bits = this.numbers.occlusion && sum(this.numbers.lost(p));
    this.patchCard.replaceChildren(
      h("h3", {}, this.patchName(p)),
      this.numbers.occlusion ? h("p", { class: "big" }, bits >= 0 ? t.lostHere(number(bits), trace.occlusion.block) : t.gainsHere(number(-bits), trace.occlusion.block)) : "",
      h("h4", {}, t.words),
      h("ol", { class: "bars" }, words.map(({ text, similarity }) => bar(text, similarity, number(similarity, 2)))),
      h("h4", {}, t.lens),
      h("ol", { class: "bars lens" }, layers.map(({ text, probability }, layer) => bar(text, probability, percent(probability), layer + 1))),
      readers.length ? h("h4", {}, t.attends) : "",
      h("p", { class: "readers" }, readers.map(([weight, text]) => h("span", {}, h("b", {}, visible(text)), ` ${percent(weight)}`))));
  }

  showOthers() {
    const { texts: t, trace } = this;
    const whole = sum(trace.tokens.map((token) => token.bits));
    const row = (name, answer, change, kind) => h("tr", { class: kind },
      h("th", { scope: "row" }, name), h("td", { class: answer === trace.answer ? "same" : null }, answer.trim() ? answer : t.nothing), h("td", { class: "value" }, change));
    const rows = [row(t.now, trace.answer, `${number(whole)}`, "now")];
    if (this.painted.size) {
      const lost = this.lostInAll;
      const answer = this.busy ? t.asking : this.problem ?? this.result?.variants.occluded?.answer ?? t.notAsked;
      rows.push(row(t.painted, answer, lost !== null && !this.busy ? signed(lost) : "", this.problem ? "painted problem" : "painted"));
    }
    for (const [name, { answer, bits, images }] of Object.entries(trace.variants)) {
      rows.push(row(t[images === "grey" ? "blank" : images] ?? name, answer, signed(sum(bits) - whole)));
    }
    this.others.replaceChildren(h("h3", {}, t.others), h("div", { class: "wide" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", { scope: "col" }, t.shown), h("th", { scope: "col" }, t.itsAnswer), h("th", { scope: "col" }, t.change))),
      h("tbody", {}, rows))));
  }

  tables() {
    const { texts: t, trace } = this;
    const table = (caption, heads, rows) => h("div", { class: "wide" }, h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, at) => h(at ? "td" : "th", at ? {} : { scope: "row" }, cell)))))));
    const details = h("details", { class: "card" }, h("summary", {}, t.tables));
    details.addEventListener("toggle", () => {
      if (details.childElementCount > 1) return;
      const attention = this.numbers.map({ source: "attention", layer: null, head: null }, null); // once for all patches
      details.append(table(t.tokens, [t.token, t.probability("").trim(), t.withImage, t.withBlank, t.fromImage, t.rivals], trace.tokens.map((token, at) => [
        visible(token.text), percent(token.probability), number(token.bits, 2), number(token.bits_blank, 2), signed(this.gains[at]),
        token.rivals.map((rival) => `${visible(rival.text)} ${percent(rival.probability)}`).join(", ")])),
      table(t.patches, [t.patch, t.words, t.lastLayer, t.wholeAnswer], trace.patches.map(({ words, layers }, p) => [
        this.patchName(p), words.map((word) => `${word.text} ${number(word.similarity, 2)}`).join(", "), visible(layers.at(-1).text),
        `${t.attention} ${percent(attention[p])}`])));
    });
    return details;
  }

  // --- drawing --------------------------------------------------------------------------------------------------------

  resize() {
    for (const { canvas } of this.views) {
      const side = Math.round(canvas.getBoundingClientRect().width * (devicePixelRatio || 1));
      if (side && canvas.width !== side) canvas.width = canvas.height = side;
    }
    this.draw();
  }

  draw() {
    const { source } = this;
    const values = source === "none" ? null : this.numbers.map(this, this.token);
    const most = values && Math.max(...values, source === "occlusion" ? LEAST : 1e-9);
    for (const view of this.views) this.drawImage(view, values?.subarray(view.first, this.firsts[view.index + 1]), most);
    const unit = source === "occlusion" ? (value) => this.texts.inBits(number(value)) : percent;
    this.scale.replaceChildren(...(values ? [h("span", {}, this.texts.none), h("span", { class: "inferno" }), h("span", {}, unit(most))] : []));
  }

  drawImage({ image, canvas, picture, first }, values, most) {
    const context = canvas.getContext("2d");
    const { width: size } = canvas;
    if (!picture.complete || !picture.naturalWidth || !size) return;
    const [wide, high] = [size / image.columns, size / image.rows];
    const rectangle = (p) => [((p - first) % image.columns) * wide, Math.floor((p - first) / image.columns) * high, wide, high];
    context.imageSmoothingEnabled = picture.naturalWidth > 160; // the pixels of a small image can be seen
    context.drawImage(picture, 0, 0, size, size);
    const painted = [...this.painted].filter((p) => p >= first && p < first + image.rows * image.columns);
    if (values) {
      const small = new OffscreenCanvas(image.columns, image.rows);
      small.getContext("2d").putImageData(heat(values, image, most, VEIL), 0, 0);
      context.imageSmoothingEnabled = true;
      context.imageSmoothingQuality = "high";
      context.drawImage(small, 0, 0, size, size);
    }
    const line = Math.max(1.5, size / 260);
    for (const p of painted) {
      context.fillStyle = GREY;
      context.fillRect(...rectangle(p));
      context.strokeStyle = "#ffffffb0";
      context.lineWidth = line / 2;
      context.strokeRect(...rectangle(p));
    }
    for (const [p, colour] of [[this.keptPatch, "#ffffffa0"], [this.patch, "#ffffff"]]) {
      if (p === null || p < first || p >= first + image.rows * image.columns) continue;
      context.strokeStyle = "#000000b0";
      context.lineWidth = 2 * line;
      context.strokeRect(...rectangle(p));
      context.strokeStyle = colour;
      context.lineWidth = line;
      context.strokeRect(...rectangle(p));
    }
  }
}

/** The colours of an image's patches; the most intense is `most`. */
function heat(values, { rows, columns }, most, [least, full]) {
  const pixels = new ImageData(columns, rows);
  values.forEach((value, at) => {
    const opacity = least + (full - least) * clamp(value / most);
    pixels.data.set([...inferno(value / most), 255 * opacity], 4 * at);
  });
  return pixels;
}
