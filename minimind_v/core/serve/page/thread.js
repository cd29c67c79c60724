// The conversation on the page: questions, answers as they grow, and what can be done with each.
import { announce, button, h, toast } from "./dom.js";
import { MessageForm } from "./message_form.js";
import { number, t } from "./strings.js";

export class Thread {
  /** `app` has `model()`, `canLook`, `lookInside(chat, node)`, `enlarge(image, n)` and `welcome()`, the empty page. */
  constructor(element, app) {
    Object.assign(this, { element, app, chat: null, editing: null, growing: null, form: null });
    this.pictures = new Map(); // image id → its element: a large image is not decoded again with each change
    // Who has scrolled up reads there: the page follows an answer only from its end.
    this.follows = true;
    let before = 0;
    element.addEventListener("scroll", () => {
      const isAtEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 60;
      this.follows = isAtEnd || (this.follows && element.scrollTop >= before); // less room does not end it
      before = element.scrollTop;
    });
    new ResizeObserver(() => this.#follow()).observe(element);
  }

  /** Show a conversation; the focus stays on the control that had it. */
  show(chat, { toEnd = false } = {}) {
    const focused = document.activeElement;
    const hadFocus = this.element !== focused && this.element.contains(focused);
    if (chat !== this.chat) {
      this.#closeEditor();
      this.pictures.clear();
    }
    this.chat = chat;
    const { nodes } = chat;
    const scroll = this.element.scrollTop;
    this.growing = null;
    this.element.replaceChildren(
      ...(nodes.length
        ? [
            h(
              "div",
              { class: "messages" },
              nodes.map((node) => this.#message(node)),
            ),
          ]
        : [this.app.welcome()]),
    );
    this.element.scrollTop = toEnd ? this.element.scrollHeight : scroll;
    this.follows ||= toEnd;
    if (!nodes.length) this.element.scrollTop = 0;
    if (hadFocus) this.#focus(focused);
  }

  /** Show more of an answer that is growing. */
  grow(node) {
    if (this.growing?.node !== node) return;
    const { text, reasoning, status } = this.growing;
    for (const [target, value] of [
      [text, node.text],
      [reasoning, node.reasoning],
    ]) {
      if (value.length > target.length) target.appendData(value.slice(target.length));
    }
    reasoning.parentElement.parentElement.hidden = !node.reasoning;
    text.parentElement.hidden = !node.text;
    this.#status(status, node);
    this.#follow();
  }

  /** Edit a question in its place. */
  edit(node) {
    const { chat } = this;
    const done = () => {
      this.#closeEditor();
      this.show(chat);
    };
    const send = (text, images) => {
      this.#closeEditor();
      chat.edit(node, text, images);
      this.element.focus();
    };
    const cancel = () => {
      done();
      this.element.querySelector(`[data-key="${node.id}:edit"]`)?.focus();
    };
    this.editing = node.id;
    this.form = new MessageForm({ id: `edit-${node.id}`, label: "editQuestion", send, cancel });
    this.form.show({ model: this.app.model() });
    this.show(chat);
    this.form.fill(
      node.text,
      node.images.map((id) => chat.images.get(id)),
    );
    this.form.focus();
  }

  /** Focus what had the focus, or what stands for it now, or a control beside that, else the conversation. */
  #focus(focused) {
    const { key } = focused.dataset;
    const control = focused.isConnected ? focused : key && this.element.querySelector(`[data-key="${key}"]`);
    const enabled = control?.disabled ? control.parentElement.querySelector("button:enabled") : control;
    (enabled ?? this.element).focus({ preventScroll: true });
  }

  #closeEditor() {
    this.editing = this.form = null;
  }

  #follow() {
    if (this.follows) this.element.scrollTop = this.element.scrollHeight;
  }

  #message(node) {
    const isQuestion = node.role === "user";
    const title = h("h2", { class: "unseen", id: `title-${node.id}` }, t(isQuestion ? "you" : "answer"));
    const content = isQuestion ? this.#question(node) : this.#answer(node);
    return h(
      "article",
      { class: isQuestion ? "question" : "answer", "aria-labelledby": `title-${node.id}`, "data-node": node.id },
      title,
      content,
    );
  }

  #question(node) {
    if (this.editing === node.id) return [this.form.element];
    const images = node.images.map((id, index) => this.#image(this.chat.images.get(id), index + 1)).filter(Boolean);
    const edit =
      !this.chat.running && button("edit", t("edit"), () => this.edit(node), { "data-key": `${node.id}:edit` });
    return [
      images.length > 0 && h("div", { class: "images" }, images),
      h("div", { class: "bubble" }, h("footer", {}, this.#versions(node), edit), h("p", { class: "text" }, node.text)),
    ];
  }

  #image(image, n) {
    if (!image) return null;
    const { id, src, name, width, height } = image;
    if (!this.pictures.has(id)) this.pictures.set(id, h("img", { src, alt: name, width, height }));
    const label = { "aria-label": t("showImage", { n }), "data-key": `${id}:enlarge` };
    return h(
      "button",
      { type: "button", class: "image", ...label, onclick: () => this.app.enlarge(image, n) },
      this.pictures.get(id),
    );
  }

  #answer(node) {
    const { running } = this.chat;
    const isGrowing = running?.node === node;
    const [text, reasoning] = [new Text(node.text), new Text(node.reasoning)];
    const summary = h("summary", { "data-key": `${node.id}:reasoning` }, t("reasoning"));
    const status = h("p", { class: "status" });
    const parts = [
      h("details", { class: "reasoning", hidden: !node.reasoning }, summary, h("p", {}, reasoning)),
      h("p", { class: "text", hidden: !node.text }, text),
      status,
    ];
    if (isGrowing) {
      this.growing = { node, text, reasoning, status };
      this.#status(status, node);
      return parts;
    }
    status.remove();
    return [
      ...parts.slice(0, 2),
      ...this.#notices(node),
      h("footer", {}, this.#versions(node), this.#actions(node), this.#stats(node)),
    ];
  }

  /** What an answer waits for before its first word. */
  #status(element, node) {
    const { running } = this.chat;
    const name = { model: node.model };
    const words = running?.wait
      ? t("waiting", { n: running.wait })
      : node.text
        ? ""
        : node.reasoning
          ? t("reasoningNow")
          : running?.isLoading
            ? t("loadingModel", name)
            : t("thinking");
    element.hidden = !words;
    if (element.dataset.words === words) return;
    element.dataset.words = words;
    element.replaceChildren(h("span", { class: "spinner" }), words);
  }

  #notices(node) {
    const end = node.end || "interrupted"; // the page was closed while it grew
    const words = [
      node.dropped > 0 && ["", t("dropped", { n: node.dropped })],
      end === "stop" && !node.text && ["", t("emptyAnswer")],
      end === "length" && ["", t("length")],
      end === "stopped" && ["", t("stopped")],
      end === "interrupted" && ["problem", t("interrupted")],
      end === "error" && ["problem", node.error],
    ];
    return words.filter(Boolean).map(([style, text]) => h("p", { class: `notice ${style}` }, text));
  }

  #actions(node) {
    if (this.chat.running) return null;
    const key = (action) => ({ "data-key": `${node.id}:${action}` });
    const copy = () => navigator.clipboard.writeText(node.text).then(() => announceToast(t("copied")));
    const canLook = this.app.canLook && node.text && this.chat.hasImages(node);
    return [
      button("retry", t("retry"), () => this.chat.retry(node), {
        ...key("retry"),
        visible: ["", "interrupted", "error"].includes(node.end),
      }),
      node.text && navigator.clipboard && button("copy", t("copy"), copy, key("copy")),
      canLook &&
        button("look", t("look"), () => this.app.lookInside(this.chat, node), { ...key("look"), visible: true }),
    ];
  }

  #stats(node) {
    const { tokens, speed, first } = node.stats ?? {};
    if (tokens == null) return null;
    const facts = [
      t("tokens", { n: tokens }),
      speed && t("speed", { n: number(speed, speed < 10 ? 1 : 0) }),
      first && t("firstToken", { n: number(first, 2) }),
    ];
    return h("span", { class: "stats" }, facts.filter(Boolean).join(" · "));
  }

  /** ‹ 2/3 › where a message has several versions. */
  #versions(node) {
    const all = this.chat.versions(node);
    if (all.length < 2) return null;
    const index = all.indexOf(node);
    const busy = Boolean(this.chat.running);
    const step = (symbol, label, other) =>
      button(
        symbol,
        t(label),
        () => {
          this.chat.choose(other);
          announce(t("versionIs", { n: all.indexOf(other) + 1, all: all.length }));
        },
        { disabled: busy || !other, "data-key": `${node.parent}:${symbol}` },
      );
    return h(
      "span",
      { class: "versions" },
      step("left", "previousVersion", all[index - 1]),
      h("span", {}, t("versionOf", { n: index + 1, all: all.length })),
      step("right", "nextVersion", all[index + 1]),
    );
  }
}

const announceToast = (text) => toast(text, null, 2);
