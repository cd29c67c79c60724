// The page: its state, and how its parts work together.
import { examples, file, Gone, isHealthy, models, Refused, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { announce, fill, h, icon, toast, translate } from "./dom.js";
import { History } from "./history.js";
import { hasViewer, lookInside } from "./inside.js";
import { MessageForm } from "./message_form.js";
import { Server } from "./server.js";
import { memory, Settings } from "./settings.js";
import { Store } from "./store.js";
import { compact, language, t } from "./strings.js";
import { Thread } from "./thread.js";
import { newConversation } from "./tree.js";

const at = (id) => document.getElementById(id);
const THEMES = ["system", "light", "dark"];
const SHORTCUTS = [
  ["keyEnter", "Enter"],
  ["keyShiftEnter", "Shift", "Enter"],
  ["keyEscape", "Esc"],
  ["keyUp", "↑"],
  ["keyNew", "Alt", "N"],
  ["keyHistory", "Alt", "H"],
  ["keySettings", "Alt", "S"],
  ["keyQuestion", "Alt", "Q"],
  ["keyShortcuts", "Alt", "K"],
];

class App {
  constructor(store) {
    this.store = store;
    this.settings = new Settings();
    this.models = [];
    this.examples = [];
    this.canLook = false;
    this.running = new Map(); // conversation id → its Chat, while an answer grows
    const answers = async () => (await isHealthy()) && (this.models.length > 0 || this.loadModels());
    this.server = new Server(answers, (state) => this.showServer(state));
    this.thread = new Thread(at("thread"), this);
    this.history = new History(at("conversations"), this);
    this.form = new MessageForm({
      id: "question",
      send: (text, images) => this.chat.ask(text, images),
      stop: () => this.chat.stop(),
      up: () => this.editLast(),
    });
    at("compose").append(this.form.element);
    this.chat = new Chat(newConversation(), new Map(), this);
  }

  // --- what the parts ask -------------------------------------------------------------------------------------------

  model() {
    return this.models.find(({ id }) => id === at("model").value) ?? null;
  }

  current() {
    return this.chat.conversation.id;
  }

  storeFailed = (error) => toast(t("storeFailed", { reason: error.message }));

  /** The messages of a conversation changed. */
  changed(chat) {
    if (chat.running) this.running.set(chat.conversation.id, chat);
    if (chat === this.chat) {
      this.thread.show(chat, { toEnd: Boolean(chat.running) });
      this.showForm();
    }
  }

  /** A conversation was stored, renamed or removed: show it, also in other tabs. */
  stored({ id }) {
    otherTabs?.postMessage(id);
    return this.history.show();
  }

  /** Another tab stored a conversation: where it is open, show it as it is now, so that neither undoes the other. */
  async storedElsewhere(id) {
    this.history.show();
    if (id !== this.current()) return;
    this.chat.isBehind = true; // until it is opened again: where it is busy, at the end of its next answer
    if (this.chat.running || this.thread.editing || (this.opening && this.opening.id !== id)) return;
    await this.open(id, this.chat.conversation.selected); // its own branch stays
  }

  grew(chat, node) {
    if (chat === this.chat) this.thread.grow(node);
  }

  ended(chat, node, error) {
    this.running.delete(chat.conversation.id);
    if (chat === this.chat) this.thread.show(chat, { toEnd: this.thread.follows });
    this.showForm();
    this.stored(chat.conversation);
    if (chat === this.chat && chat.isBehind) this.storedElsewhere(chat.conversation.id);
    if (node.end === "stopped") announce(t("answerStopped"));
    else
      announce(
        error
          ? t("answerFailed", { reason: node.error || t("interrupted") })
          : t("answerDone", { text: node.text || t("emptyAnswer") }),
      );
    if (error) this.failed(error);
    else if (!this.model()?.mmv?.loaded) this.loadModels();
  }

  /** A call failed: the page does what helps. */
  failed(error) {
    if (error instanceof Gone) this.server.lost();
    else if (error instanceof Refused && error.status === 401) this.askKey();
    else if (error instanceof Refused && error.status === 404) this.loadModels(); // it has others since it began anew
  }

  lookInside(chat, node) {
    const question = chat.conversation.nodes.find(({ id }) => id === node.parent);
    const { max_tokens = 512 } = this.settings.values(this.model());
    lookInside({ model: node.model, messages: chat.messages(question), answer: node.text, max_tokens });
  }

  enlarge(image, n) {
    const dialog = at("image");
    fill(
      dialog,
      t("imageN", { n }),
      h("img", { src: image.src, alt: image.name, width: image.width, height: image.height }),
    );
    dialog.showModal();
  }

  /** Edit the last question; returns whether there is one. */
  editLast() {
    const question = this.chat.nodes.findLast(({ role }) => role === "user");
    if (question && !this.chat.running) this.thread.edit(question);
    return Boolean(question);
  }

  // --- conversations ------------------------------------------------------------------------------------------------

  /** Open a conversation as it is stored now; `selected` are branches to show. */
  async open(id, selected = {}) {
    if (this.running.has(id)) return this.start(this.running.get(id));
    const opening = (this.opening = { id });
    const conversation = await this.store.get(id);
    const images = conversation && (await this.store.images(conversation));
    if (this.opening !== opening) return; // another one was chosen meanwhile
    this.opening = null;
    if (!conversation) return this.history.show(); // it was deleted in another tab
    Object.assign(conversation.selected, selected);
    const chat = new Chat(conversation, new Map(images.map((image) => [image.id, image])), this);
    this.start(this.running.get(id) ?? chat);
  }

  start(chat) {
    this.opening = null;
    this.chat = chat;
    this.closeHistory();
    this.thread.follows = true;
    this.thread.show(chat, { toEnd: true });
    this.showForm();
    this.history.show();
  }

  restart() {
    this.start(new Chat(newConversation(), new Map(), this));
    this.form.focus();
  }

  async rename(conversation, title) {
    const chat = conversation.id === this.current() ? this.chat : this.running.get(conversation.id);
    const target = chat?.conversation ?? conversation;
    target.title = title;
    await this.store.save(target).catch(this.storeFailed);
    if (chat === this.chat) this.showForm();
    await this.stored(target);
  }

  removed(conversation) {
    this.running.get(conversation.id)?.remove();
    if (conversation.id === this.current()) this.start(new Chat(newConversation(), new Map(), this));
  }

  // --- the server ---------------------------------------------------------------------------------------------------

  /** List the models; returns whether the server answered. Without its list it is asked again until it does. */
  async loadModels() {
    try {
      this.models = await models();
    } catch (error) {
      const needsKey = error instanceof Refused && error.status === 401;
      if (needsKey) this.askKey();
      else if (error instanceof Refused && !this.server.trying)
        toast(error.message || t("serverError", { status: error.status }));
      if (!needsKey) this.server.lost();
      return needsKey;
    }
    const chosen = at("model").value || memory.get("model");
    const isAlone = this.models.length === 1; // else a checkpoint may stand beside its converted copy
    const name = ({ id, mmv }) => (isAlone || !mmv?.format || id.endsWith(mmv.format) ? id : `${id} (${mmv.format})`);
    const options = this.models.map((model) => h("option", { value: model.id }, name(model)));
    at("model").replaceChildren(...(options.length ? options : [h("option", { value: "" }, t("noModel"))]));
    if (this.models.some(({ id }) => id === chosen)) at("model").value = chosen;
    at("model").disabled = !this.models.length;
    this.showForm();
    const [list, canLook] = await Promise.all([examples().catch(() => this.examples), hasViewer()]);
    Object.assign(this, { examples: list, canLook });
    if (!this.chat.running) this.thread.show(this.chat);
    return true;
  }

  showServer({ gone, wait }) {
    const banner = at("banner");
    if (gone) {
      const words = wait === null ? t("goneTrying") : t("gone", { n: wait });
      if (!banner.firstChild) {
        // A screen reader hears once that the server is gone, not each second of the countdown.
        const [spoken, shown] = [h("span", { class: "unseen" }, words), h("span", { "aria-hidden": "true" })];
        banner.replaceChildren(
          spoken,
          shown,
          h("button", { type: "button", onclick: () => this.server.tryNow() }, t("tryNow")),
        );
      }
      banner.children[1].textContent = words;
      return;
    }
    banner.replaceChildren();
    toast(t("back"), null, 4);
    this.loadModels();
  }

  askKey() {
    const dialog = at("key");
    if (dialog.open) return;
    const input = h("input", {
      type: "password",
      id: "key-input",
      autocomplete: "off",
      required: true,
      spellcheck: "false",
    });
    const submit = (event) => {
      event.preventDefault();
      useKey(input.value.trim());
      this.keyWasAsked = true;
      dialog.close();
      this.loadModels();
    };
    fill(
      dialog,
      t("keyTitle"),
      h(
        "form",
        { onsubmit: submit },
        h("p", {}, t("keyText")),
        this.keyWasAsked && h("p", { class: "problem", role: "alert" }, t("keyWrong")),
        h("div", { class: "field" }, h("label", { for: "key-input" }, t("keyTitle")), input),
        h("div", { class: "pair" }, h("button", { class: "primary" }, t("keyUse"))),
      ),
    );
    dialog.showModal();
    input.focus();
  }

  // --- what is shown ------------------------------------------------------------------------------------------------

  showForm() {
    const running = Boolean(this.chat.running);
    this.form.show({
      model: this.model(),
      busy: running,
      placeholder: this.chat.nodes.length ? "askMore" : "askFirst",
    });
    const { title } = this.chat.conversation;
    at("title").textContent = title || t("newConversation");
    document.title = title ? `${title} · mmv` : "mmv";
    this.thread.form?.show({ model: this.model(), busy: running });
    sessionCurrent.set(this.chat.nodes.length ? this.current() : null);
  }

  /** The page before the first question: what the model is, and examples. */
  welcome() {
    const model = this.model();
    const seesImages = model?.mmv?.images !== false;
    const own = this.examples.filter(({ question }) => /\p{Script=Han}/u.test(question) === (language() === "zh"));
    const cards = seesImages
      ? (own.length ? own : this.examples).map((example) =>
          h(
            "li",
            {},
            h(
              "button",
              { type: "button", class: "card", onclick: () => this.tryExample(example) },
              h("img", { src: example.image, alt: "" }),
              h("span", {}, example.question),
            ),
          ),
        )
      : [];
    return h(
      "div",
      { class: "welcome" },
      h("h2", {}, t(seesImages ? "welcome" : "welcomeText")),
      seesImages
        ? h(
            "button",
            { type: "button", class: "drop-here", onclick: () => this.form.choose() },
            icon("image"),
            h("span", {}, t("welcomeHint")),
          )
        : h("p", {}, t("welcomeHintText")),
      cards.length > 0 && [h("h3", {}, t("examples")), h("ul", { class: "cards" }, cards)],
      model?.mmv && h("p", { class: "facts" }, this.facts(model.mmv)),
    );
  }

  facts({ parameters, stage, context, images, tokens_per_image }) {
    const words = {
      size: parameters ? compact(parameters) : "?",
      stage: stage || t("stageUnknown"),
      context,
      image: tokens_per_image,
    };
    return t(images === false ? "modelFactsText" : "modelFacts", words);
  }

  async tryExample({ image, question }) {
    try {
      const blob = await file(image);
      await this.form.add([new File([blob], image.split("/").at(-1), { type: blob.type })]);
      this.form.fill(question, this.form.images);
      this.form.element.requestSubmit();
    } catch (error) {
      this.failed(error);
    }
  }

  showTheme() {
    const theme = document.documentElement.dataset.theme ?? "system";
    const name = { system: "themeSystem", light: "themeLight", dark: "themeDark" }[theme];
    at("theme").replaceChildren(icon(theme));
    at("theme").title = t(name);
    at("theme").setAttribute("aria-label", t(name));
  }

  nextTheme() {
    const root = document.documentElement;
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    memory.set("theme", next === "system" ? null : next);
    this.showTheme();
  }

  nextLanguage() {
    document.documentElement.lang = language() === "zh" ? "en" : "zh";
    memory.set("language", language());
    this.showAll();
  }

  showAll() {
    translate();
    at("language").textContent = t("otherLanguage");
    at("language").setAttribute("aria-label", t("otherLanguageLabel"));
    at("language").lang = language() === "zh" ? "en" : "zh";
    at("memory-note").hidden = this.store.keeps;
    this.showTheme();
    this.thread.show(this.chat);
    this.showForm();
    return this.history.show();
  }

  openShortcuts() {
    const rows = SHORTCUTS.map(([key, ...keys]) => [
      h(
        "dt",
        {},
        keys.map((name) => h("kbd", {}, name)),
      ),
      h("dd", {}, t(key)),
    ]);
    fill(at("shortcuts"), t("shortcuts"), h("dl", {}, rows));
    at("shortcuts").showModal();
  }

  // --- history's drawer ---------------------------------------------------------------------------------------------

  get isNarrow() {
    return matchMedia("(max-width: 820px)").matches;
  }

  showHistory(isOpen) {
    document.body.classList.toggle("history-open", isOpen);
    at("history").inert = !isOpen;
    at("toggle-history").setAttribute("aria-expanded", isOpen);
    document.querySelector(".column").inert = isOpen && this.isNarrow;
  }

  toggleHistory() {
    const isOpen = !document.body.classList.contains("history-open");
    this.showHistory(isOpen);
    if (!this.isNarrow) memory.set("history", isOpen ? null : "closed");
    if (this.isNarrow) at(isOpen ? "new" : "toggle-history").focus();
  }

  /** A drawer on a narrow page closes when something in it was chosen. */
  closeHistory() {
    if (this.isNarrow && document.body.classList.contains("history-open")) this.toggleHistory();
  }
}

// The conversation of this tab, which a reload opens again.
const sessionCurrent = {
  get: () => {
    try {
      return sessionStorage.getItem("mmv.current");
    } catch {
      return null;
    }
  },
  set: (id) => {
    try {
      id ? sessionStorage.setItem("mmv.current", id) : sessionStorage.removeItem("mmv.current");
    } catch {}
  },
};
const otherTabs = "BroadcastChannel" in window ? new BroadcastChannel("mmv") : null;

function listen(app) {
  const click = (id, run) => at(id).addEventListener("click", run);
  click("new", () => app.restart());
  click("toggle-history", () => app.toggleHistory());
  click("close-history", () => app.toggleHistory());
  click("scrim", () => app.closeHistory());
  click("theme", () => app.nextTheme());
  click("language", () => app.nextLanguage());
  click("open-settings", () => app.settings.open(app.model()));
  click("open-shortcuts", () => app.openShortcuts());
  click("export", async () => app.history.export(await app.store.list()));
  click("import", () => at("import-file").click());
  at("import-file").addEventListener("change", () => {
    const [chosen] = at("import-file").files;
    at("import-file").value = "";
    if (chosen) app.history.import(chosen);
  });
  at("model").addEventListener("change", () => {
    memory.set("model", at("model").value);
    app.showForm();
    app.thread.show(app.chat);
  });
  if (otherTabs) otherTabs.onmessage = ({ data }) => app.storedElsewhere(data);
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    }); // the backdrop
  }
  matchMedia("(max-width: 820px)").addEventListener("change", ({ matches }) =>
    app.showHistory(!matches && memory.get("history") !== "closed"),
  );
}

function listenToKeys(app) {
  const shortcuts = {
    KeyN: () => app.restart(),
    KeyH: () => app.toggleHistory(),
    KeyS: () => app.settings.open(app.model()),
    KeyQ: () => app.form.focus(),
    KeyK: () => app.openShortcuts(),
  };
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.altKey && !event.ctrlKey && !event.metaKey && shortcuts[event.code]) {
      event.preventDefault();
      shortcuts[event.code]();
    } else if (event.key === "Escape") {
      if (app.isNarrow && document.body.classList.contains("history-open")) app.toggleHistory();
      else app.chat.stop();
    }
  });
}

/** Images that are pasted or dropped anywhere go to the form that is being written. */
function listenToImages(app) {
  const form = () => (app.thread.form?.element.isConnected ? app.thread.form : app.form);
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const show = (isOver) => {
    at("drop").hidden = !isOver;
  };
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    // What a word processor copies has text, and an image of it; text is what was meant.
    if (!files.length || event.clipboardData.types.includes("text/plain") || document.querySelector("dialog[open]"))
      return;
    event.preventDefault();
    form().add(files);
  });
  document.addEventListener("dragenter", (event) => {
    if (hasFiles(event)) show(true);
  });
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) show(false);
  });
  document.addEventListener("drop", (event) => {
    show(false);
    if (!hasFiles(event)) return;
    event.preventDefault();
    form().add([...event.dataTransfer.files]);
  });
}

async function begin() {
  const app = new App(await Store.open());
  listen(app);
  listenToKeys(app);
  listenToImages(app);
  app.showHistory(!app.isNarrow && memory.get("history") !== "closed");
  const last = sessionCurrent.get();
  await app.showAll();
  if (last) await app.open(last);
  await app.loadModels();
  document.documentElement.dataset.ready = "";
}

begin();
