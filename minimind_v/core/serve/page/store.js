// The history in this browser: IndexedDB, or memory where a browser (in a private window) refuses it.
import { checked, merge } from "./tree.js";

const asPromise = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

function openDatabase() {
  const request = indexedDB.open("mmv", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("conversations", { keyPath: "id" });
    request.result.createObjectStore("images", { keyPath: "id" }).createIndex("conversation", "conversation");
  };
  return asPromise(request);
}

/** Conversations and their images `{ id, src, name, width, height }`, where `src` is a data URI. */
export class Store {
  /** Open the history. Where the browser stores nothing, `keeps` is false and all is held in memory. */
  static async open() {
    const store = new Store();
    try {
      store.database = await openDatabase();
      store.database.onversionchange = () => store.database.close();
    } catch {
      store.memory = { conversations: new Map(), images: new Map() };
    }
    store.keeps = Boolean(store.database);
    return store;
  }

  async #do(name, mode, work) {
    const transaction = this.database.transaction(name, mode);
    const result = work(transaction.objectStore(name));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
    return result?.result;
  }

  /** All conversations, the latest first. */
  async list() {
    const all = this.memory
      ? [...this.memory.conversations.values()]
      : await this.#do("conversations", "readonly", (s) => s.getAll());
    return all.sort((a, b) => b.changed - a.changed);
  }

  /** A conversation by its id; undefined where it was removed. */
  async get(id) {
    return this.memory ? this.memory.conversations.get(id) : this.#do("conversations", "readonly", (s) => s.get(id));
  }

  /**
   * Store a conversation, which also gets what another tab added to the stored one. Raises what the browser raises, as
   * where the disk is full.
   */
  async save(conversation) {
    if (this.memory) this.memory.conversations.set(conversation.id, structuredClone(conversation));
    else
      await this.#do("conversations", "readwrite", (s) => {
        const request = s.get(conversation.id);
        request.onsuccess = () => {
          merge(conversation, request.result);
          s.put(conversation);
        };
      });
  }

  async saveImages(conversation, images) {
    const records = images.map((image) => ({ ...image, conversation: conversation.id }));
    if (this.memory) for (const record of records) this.memory.images.set(record.id, record);
    else
      await this.#do("images", "readwrite", (s) => {
        for (const record of records) s.put(record);
      });
  }

  async images(conversation) {
    if (this.memory) return [...this.memory.images.values()].filter((image) => image.conversation === conversation.id);
    return this.#do("images", "readonly", (s) => s.index("conversation").getAll(conversation.id));
  }

  async remove(conversation) {
    const images = await this.images(conversation);
    if (this.memory) {
      for (const { id } of images) this.memory.images.delete(id);
      this.memory.conversations.delete(conversation.id);
    } else {
      await this.#do("images", "readwrite", (s) => {
        for (const { id } of images) s.delete(id);
      });
      await this.#do("conversations", "readwrite", (s) => s.delete(conversation.id));
    }
  }

  /** Conversations with their images, as a file holds them. */
  async export(conversations) {
    const records = await Promise.all(
      conversations.map(async (conversation) => {
        const images = (await this.images(conversation)).map(({ id, src, name, width, height }) => ({
          id,
          src,
          name,
          width,
          height,
        }));
        return { ...conversation, images };
      }),
    );
    return { mmv: "conversations", version: 1, conversations: records };
  }

  /** Add the conversations of such a file, beside those that exist; returns them. Raises TypeError for another file. */
  async import(file) {
    if (file?.mmv !== "conversations" || file.version !== 1 || !Array.isArray(file.conversations))
      throw new TypeError("not an export");
    const entries = file.conversations.map((record) => [checked(record), checkedImages(record?.images)]);
    if (entries.some(([conversation, images]) => !conversation || !images)) throw new TypeError("a damaged export");
    for (const [conversation, images] of entries) {
      // Ids of images are those of the file: they could be those of another conversation here.
      const own = new Map(images.map((image, index) => [image.id, `${conversation.id}.${index}`]));
      for (const node of conversation.nodes) node.images = node.images.map((id) => own.get(id)).filter(Boolean);
      await this.saveImages(
        conversation,
        images.map((image) => ({ ...image, id: own.get(image.id) })),
      );
      await this.save(conversation);
    }
    return entries.map(([conversation]) => conversation);
  }
}

function checkedImages(images) {
  if (!Array.isArray(images)) return null;
  const isImage = ({ id, src, name, width, height }) =>
    typeof id === "string" &&
    typeof name === "string" &&
    /^data:image\/(png|jpeg|webp|gif);base64,/.test(src) &&
    [width, height].every(Number.isFinite);
  return images.every((image) => image && isImage(image)) ? images : null;
}
