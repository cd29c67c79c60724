// A question as it is written: text, images from files, the clipboard, a drop or the camera, and what sends it.
import { takePhoto } from "./camera.js";
import { announce, button, h, toast } from "./dom.js";
import { readImage, Unreadable } from "./images.js";
import { t } from "./strings.js";

export class MessageForm {
  /** `send(text, images)`, `stop()` where an answer can be stopped, `cancel()` where the form can be closed. */
  constructor({ id, send, stop = null, cancel = null, up = null, label = "question" }) {
    Object.assign(this, { id, onsend: send, onstop: stop, oncancel: cancel, onup: up, label });
    this.images = [];
    this.reading = 0;
    this.text = h("textarea", { id, rows: 1, oninput: () => this.#changed(), onkeydown: (event) => this.#key(event) });
    this.files = h("input", {
      type: "file",
      accept: "image/*",
      multiple: true,
      hidden: true,
      onchange: () => this.#chosen(this.files),
    });
    this.photo = h("input", {
      type: "file",
      accept: "image/*",
      capture: "environment",
      hidden: true,
      onchange: () => this.#chosen(this.photo),
    });
    this.thumbnails = h("ul", { class: "thumbnails" });
    this.bar = h("div", { class: "form-bar" });
    const submit = (event) => {
      event.preventDefault();
      this.#send();
    };
    this.element = h(
      "form",
      { class: "message-form", onsubmit: submit },
      this.thumbnails,
      this.text,
      this.bar,
      this.files,
      this.photo,
    );
    this.element.addEventListener("pointerdown", (event) => {
      if (event.target === this.element) this.text.focus();
    });
  }

  /** Show the form for a model, in today's language; `busy`: an answer is running, `placeholder` names a sentence. */
  show({ model, busy = false, placeholder = "askFirst" }) {
    Object.assign(this, { model, busy, placeholder });
    this.text.setAttribute("aria-label", t(this.label));
    this.text.placeholder = t(placeholder);
    for (const input of [this.files, this.photo]) input.setAttribute("aria-label", t("chooseImages"));
    const key = (name) => ({ "data-key": `${this.id}:${name}` });
    const images = model?.mmv?.images !== false && [
      button("image", t("chooseImages"), () => this.choose(), key("choose")),
      canPhotograph() && button("camera", t("useCamera"), () => this.#photograph(), key("camera")),
    ];
    this.submit =
      busy && this.onstop
        ? button("stop", t("stop"), () => this.onstop(), { class: "icon send stop", ...key("stop") })
        : button("send", t("send"), () => {}, { class: "icon send", type: "submit", ...key("send") });
    const cancel = this.oncancel && h("button", { type: "button", onclick: this.oncancel }, t("cancel"));
    const hadFocus = this.bar.contains(document.activeElement);
    this.bar.replaceChildren(
      ...[images || [], h("span", { class: "space" }), cancel || [], this.submit].flat().filter(Boolean),
    );
    if (hadFocus) (busy ? this.submit : this.text).focus();
    this.#showThumbnails();
    this.#changed();
  }

  fill(text, images) {
    this.text.value = text;
    this.images = [...images];
    this.#showThumbnails();
    this.#changed();
  }

  focus() {
    this.text.focus();
    this.text.setSelectionRange(this.text.value.length, this.text.value.length);
  }

  /** Let the browser ask for files. */
  choose() {
    this.files.click();
  }

  /** Add image files; what cannot be read is said, the others are added. */
  async add(files) {
    const { model } = this;
    if (model?.mmv?.images === false) return toast(t("noImages", { model: model.id }));
    this.reading += 1;
    this.#showThumbnails();
    for (const file of files) {
      try {
        const image = await readImage(file);
        if (this.images.length < this.#room()) this.images.push(image);
        else {
          toast(t("tooManyImages", { model: model.id, n: this.#room() }));
          break;
        }
      } catch (error) {
        const message = error instanceof Unreadable ? t(error.key, { name: error.name }) : error.message;
        toast(message); // other errors are the browser's: of a file that is gone meanwhile
      }
    }
    this.reading -= 1;
    this.#showThumbnails();
    this.#changed();
    this.text.focus();
  }

  /** How many images one question may have: a quarter of the context stays free for the answer. */
  #room() {
    const { context, tokens_per_image: each } = this.model?.mmv ?? {};
    return context && each ? Math.max(1, Math.floor((context * 3) / 4 / each)) : Infinity;
  }

  #chosen(input) {
    const files = [...input.files];
    input.value = ""; // the same file can be chosen again
    this.add(files);
  }

  async #photograph() {
    // A phone has a camera of its own.
    if (matchMedia("(pointer: coarse)").matches || !navigator.mediaDevices) return this.photo.click();
    const file = await takePhoto();
    if (file) await this.add([file]);
  }

  #showThumbnails() {
    const items = this.images.map((image, index) =>
      h(
        "li",
        {},
        h("img", { src: image.src, alt: t("imageOf", { ...image, n: index + 1 }) }),
        button("close", t("removeImage", { n: index + 1 }), () => this.#remove(index)),
      ),
    );
    const reading =
      this.reading > 0 &&
      h("li", { class: "reading", "aria-label": t("readingImages") }, h("span", { class: "spinner" }));
    this.thumbnails.replaceChildren(...items, ...(reading ? [reading] : []));
    if (this.reading > 0) announce(t("readingImages"));
  }

  #remove(index) {
    this.images.splice(index, 1);
    this.#showThumbnails();
    this.#changed();
    (this.thumbnails.querySelectorAll("button")[Math.min(index, this.images.length - 1)] ?? this.text).focus();
  }

  #changed() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
    if (this.submit?.type === "submit") this.submit.disabled = !this.#isReady();
    this.text.placeholder = t(
      this.images.length && this.placeholder !== "askMore" ? "askImage" : (this.placeholder ?? "askFirst"),
    );
  }

  #isReady() {
    return Boolean((this.text.value.trim() || this.images.length) && !this.reading && !this.busy && this.model);
  }

  #key(event) {
    // While an input method composes a word, its Enter and Escape are its own.
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey && !event.altKey) {
      event.preventDefault();
      this.#send();
    } else if (event.key === "ArrowUp" && this.onup && !this.text.value) {
      if (this.onup()) event.preventDefault();
    } else if (event.key === "Escape" && this.oncancel) {
      event.stopPropagation();
      this.oncancel();
    }
  }

  #send() {
    if (!this.#isReady()) return;
    const [text, images] = [this.text.value.trim() || t("describe"), this.images];
    this.fill("", []);
    this.onsend(text, images);
  }
}

const canPhotograph = () => Boolean(navigator.mediaDevices?.getUserMedia) || matchMedia("(pointer: coarse)").matches;
