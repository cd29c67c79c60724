// The list of conversations: open, rename, delete, import, export.
import { button, h, toast } from "./dom.js";
import { t } from "./strings.js";

export class History {
  /** `app` has `store`, `current()`, `open(id)`, `rename(conversation, title)`, `removed(conversation)`. */
  constructor(element, app) {
    Object.assign(this, { element, app, renaming: null });
  }

  async show() {
    const conversations = await this.app.store.list();
    const key = document.activeElement?.dataset?.key;
    this.element.replaceChildren(...conversations.map((conversation) => this.#item(conversation)));
    if (key) this.element.querySelector(`[data-key="${key}"]`)?.focus();
  }

  #item(conversation) {
    const { id } = conversation;
    const name = conversation.title || t("untitled");
    if (this.renaming === id) return h("li", {}, this.#renameForm(conversation));
    const open = h(
      "button",
      {
        type: "button",
        class: "title",
        "data-key": `${id}:open`,
        title: name,
        "aria-current": this.app.current() === id ? "true" : null,
        onclick: () => this.app.open(id),
      },
      name,
    );
    return h(
      "li",
      {},
      open,
      button(
        "edit",
        `${t("rename")}: ${name}`,
        () => {
          this.renaming = id;
          this.show().then(() => this.element.querySelector("input").select());
        },
        { "data-key": `${id}:rename` },
      ),
      button("export", `${t("export")}: ${name}`, () => this.export([conversation]), { "data-key": `${id}:export` }),
      button("trash", `${t("remove")}: ${name}`, () => this.#remove(conversation), { "data-key": `${id}:remove` }),
    );
  }

  #renameForm(conversation) {
    const input = h("input", { value: conversation.title, "aria-label": t("rename"), maxlength: 200 });
    const done = async (save) => {
      if (this.renaming !== conversation.id) return;
      this.renaming = null;
      if (save && input.value.trim()) await this.app.rename(conversation, input.value.trim());
      await this.show();
      this.element.querySelector(`[data-key="${conversation.id}:rename"]`)?.focus();
    };
    input.addEventListener("blur", () => done(true));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        done(false);
      }
    });
    return h(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          done(true);
        },
      },
      input,
    );
  }

  async #remove(conversation) {
    const { store } = this.app;
    const images = await store.images(conversation);
    await this.app.removed(conversation);
    await store.remove(conversation);
    await this.show();
    (this.element.querySelector("button") ?? document.getElementById("new")).focus();
    toast(t("removed"), {
      text: t("undo"),
      run: async () => {
        await store.saveImages(conversation, images);
        await store.save(conversation);
        await this.show();
      },
    });
  }

  /** Let the browser save conversations as a file. */
  async export(conversations) {
    if (!conversations.length) return toast(t("nothingToExport"));
    const text = JSON.stringify(await this.app.store.export(conversations));
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    h("a", { href: url, download: "mmv-conversations.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  async import(file) {
    try {
      const added = await this.app.store.import(JSON.parse(await file.text()));
      toast(t("imported", { n: added.length }));
      await this.show();
      if (added.length === 1) this.app.open(added[0].id);
    } catch (error) {
      const isForeign = error instanceof TypeError || error instanceof SyntaxError;
      toast(isForeign ? t("importFailed", { name: file.name }) : t("storeFailed", { reason: error.message }));
    }
  }
}
