// An open conversation: it asks the server, and takes the answer into the tree as it comes.
import { answer, Gone, Refused } from "./api.js";
import { append, parentOf, path, pathTo, select, versions } from "./tree.js";

const PATIENCE = 20; // tries of a busy server before its refusal is shown
const SAVE_EVERY = 1000; // milliseconds between two saves of a growing answer

export class Chat {
  /**
   * `images` maps ids to images. `app` has `store`, `settings`, `model()` and `loadModels()`, and hears `changed(chat)`
   * of other messages, `grew(chat, node)` of more text, `ended(chat, node, error)`, `stored(conversation)` and
   * `storeFailed(error)`.
   */
  constructor(conversation, images, app) {
    Object.assign(this, { conversation, images, app, running: null });
  }

  get nodes() {
    return path(this.conversation);
  }

  versions(node) {
    return versions(this.conversation, node);
  }

  /** Whether an image stands in the conversation before this answer. */
  hasImages(node) {
    return pathTo(this.conversation, node).some(({ images }) => images.length);
  }

  /** Ask a question at the end of the selected way. */
  ask(text, images) {
    return this.#ask(this.nodes.at(-1) ?? null, text, images);
  }

  /** Ask an earlier question anew: its other words, and the answer, are a new branch. */
  edit(question, text, images) {
    return this.#ask(parentOf(this.conversation, question), text, images);
  }

  #ask(parent, text, images) {
    const { conversation, app } = this;
    const added = images.filter(({ id }) => !this.images.has(id));
    for (const image of added) this.images.set(image.id, image);
    conversation.title ||= text.replace(/\s+/g, " ").trim().slice(0, 80);
    const question = append(conversation, parent, { role: "user", text, images: images.map(({ id }) => id) });
    return this.#answer(question, app.store.saveImages(conversation, added).catch(app.storeFailed));
  }

  /** Answer a question once more. An answer without a word is replaced, any other stays as a version. */
  retry(node) {
    const { app, conversation } = this;
    if (!app.model()) return app.loadModels(); // the server was not there yet
    if (!node.text && !node.reasoning) conversation.nodes = conversation.nodes.filter(({ id }) => id !== node.id);
    return this.#answer(parentOf(conversation, node));
  }

  /** Show another version of a message. */
  async choose(node) {
    select(this.conversation, node);
    this.app.changed(this);
    await this.save();
    this.app.stored(this.conversation);
  }

  stop() {
    this.running?.controller.abort();
  }

  /** The conversation was deleted: its answer stops and is not stored. */
  remove() {
    this.isRemoved = true;
    this.stop();
  }

  async save() {
    if (this.isRemoved) return;
    this.saved = Date.now();
    await this.app.store.save(this.conversation).catch(this.app.storeFailed);
  }

  /** The conversation up to a message, as the server takes it. */
  messages(last) {
    const { system } = this.app.settings;
    const turns = pathTo(this.conversation, last).map(({ role, text, images }) => {
      const parts = images
        .filter((id) => this.images.has(id))
        .map((id) => ({ type: "image_url", image_url: { url: this.images.get(id).src } }));
      return { role, content: parts.length ? [...parts, { type: "text", text }] : text };
    });
    return system ? [{ role: "system", content: system }, ...turns] : turns;
  }

  /** `stored`: a promise that the question's images are stored. */
  async #answer(question, stored = null) {
    const { app, conversation } = this;
    const model = app.model();
    const body = { model: model.id, messages: this.messages(question), ...app.settings.values(model) };
    const fresh = { text: "", images: [], reasoning: "", model: model.id, end: "", error: "", dropped: 0, stats: null };
    const node = append(conversation, question, { role: "assistant", ...fresh });
    this.running = { node, controller: new AbortController(), wait: null, isLoading: model.mmv?.loaded === false };
    app.changed(this); // at once: a second press of a button must find it busy, however slow the history is
    await stored;
    await this.save();
    app.stored(conversation);
    let failure = null;
    try {
      await this.#patiently(body, node);
    } catch (error) {
      failure = error;
      node.end = this.running.controller.signal.aborted ? "stopped" : error instanceof Gone ? "interrupted" : "error";
      if (node.end === "error") node.error = error.message || `HTTP ${error.status ?? ""}`;
    }
    this.running = null;
    conversation.changed = Date.now();
    await this.save();
    app.ended(this, node, failure);
  }

  /** Stream an answer; a busy server is asked again after the time that it names. */
  async #patiently(body, node) {
    for (let tries = 1; ; tries += 1) {
      try {
        return await this.#stream(body, node);
      } catch (error) {
        if (!(error instanceof Refused) || ![429, 503].includes(error.status) || !error.wait || tries === PATIENCE)
          throw error;
        await this.#wait(Math.ceil(error.wait), node);
      }
    }
  }

  async #wait(seconds, node) {
    const { signal } = this.running.controller;
    for (let left = seconds; left > 0; left -= 1) {
      this.running.wait = left;
      this.app.grew(this, node);
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, 1000);
        signal.addEventListener(
          "abort",
          () => {
            clearTimeout(timer);
            resolve();
          },
          { once: true },
        );
      });
      signal.throwIfAborted();
    }
    this.running.wait = null;
    this.app.grew(this, node);
  }

  async #stream(body, node) {
    const asked = performance.now();
    let first = 0,
      last = 0;
    for await (const chunk of answer(body, this.running.controller.signal)) {
      const [choice] = chunk.choices ?? [];
      const { content, reasoning_content: reasoning } = choice?.delta ?? {};
      if (content || reasoning) first ||= last = performance.now();
      if (content || reasoning) last = performance.now();
      node.text += content ?? "";
      node.reasoning += reasoning ?? "";
      if (choice?.finish_reason) node.end = choice.finish_reason;
      if (chunk.mmv?.dropped_turns) node.dropped = chunk.mmv.dropped_turns;
      if (chunk.usage) node.stats = stats(chunk.usage.completion_tokens, asked, first, last);
      if (Date.now() - this.saved > SAVE_EVERY) this.save();
      this.app.grew(this, node);
    }
    node.end ||= "stop";
  }
}

/** Tokens, seconds to the first one, and tokens per second from then on. */
function stats(tokens, asked, first, last) {
  if (!first) return { tokens };
  return {
    tokens,
    first: (first - asked) / 1000,
    ...(tokens > 2 && last > first ? { speed: ((tokens - 1) * 1000) / (last - first) } : {}),
  };
}
