// A conversation as a tree: an edited question or a repeated answer becomes a sibling, and nothing is lost.
//
// { id, title, changed, nodes: [{ id, parent, role, text, images: [image ids], … }], selected: { parent id: node id } }
// The first question's parent is "". Nodes are in the order in which they were made.

/** An id that no other has. `crypto.randomUUID` exists only where the page came over HTTPS or from this machine. */
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export const newConversation = () => ({ id: newId(), title: "", changed: Date.now(), nodes: [], selected: {} });

/** Add a message below `parent` (null: as a first question) and select it. */
export function append(conversation, parent, message) {
  const node = { id: newId(), parent: parent?.id ?? "", ...message };
  conversation.nodes.push(node);
  select(conversation, node);
  conversation.changed = Date.now();
  return node;
}

export function select(conversation, node) {
  conversation.selected[node.parent] = node.id;
}

/** Add what only `other`, the same conversation in another tab, has: messages, what follows, and the rest of answers. */
export function merge(conversation, other) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const length = ({ text, reasoning = "" }) => text.length + reasoning.length;
  for (const node of other?.nodes ?? []) {
    const own = byId.get(node.id);
    if (own && ((node.end && !own.end) || length(node) > length(own))) Object.assign(own, node);
    if (!own && length(node)) conversation.nodes.push(node); // an answer without a word may have been replaced
  }
  conversation.selected = { ...other?.selected, ...conversation.selected };
}

/** All versions of a message, itself included. */
export const versions = (conversation, node) => conversation.nodes.filter(({ parent }) => parent === node.parent);

export const parentOf = (conversation, node) => conversation.nodes.find(({ id }) => id === node.parent) ?? null;

/** The messages on the selected way, from the first question down. */
export function path(conversation) {
  const byId = new Map(conversation.nodes.map((node) => [node.id, node]));
  const nodes = [];
  for (let id = conversation.selected[""]; byId.has(id); id = conversation.selected[id]) nodes.push(byId.get(id));
  return nodes;
}

/** The messages from the first question to `node`. */
export function pathTo(conversation, node) {
  const nodes = [];
  for (let above = node; above; above = parentOf(conversation, above)) nodes.unshift(above);
  return nodes;
}

/**
 * Check a conversation that came from a file; returns a copy with nothing but what this page knows, or null. Its ids are
 * new, and it selects no message but a child: a circle would never end.
 */
export function checked(value) {
  const isText = (text) => typeof text === "string";
  if (!value || !isText(value.title) || !Number.isFinite(value.changed) || !Array.isArray(value.nodes)) return null;
  const own = new Map([["", ""]]); // id in the file → id here
  const nodes = [];
  for (const node of value.nodes) {
    const { id, parent, role, text, images = [] } = node ?? {};
    if (!isText(id) || own.has(id) || !own.has(parent) || !["user", "assistant"].includes(role) || !isText(text))
      return null;
    if (!Array.isArray(images) || !images.every(isText)) return null;
    own.set(id, newId());
    const { reasoning = "", model = "", end = "", error = "", dropped = 0, stats = null } = node;
    if (![reasoning, model, end, error].every(isText) || !Number.isFinite(dropped)) return null;
    nodes.push({
      id: own.get(id),
      parent: own.get(parent),
      role,
      text,
      images,
      ...(role === "assistant" ? { reasoning, model, end, error, dropped, stats: checkedStats(stats) } : {}),
    });
  }
  const children = new Set(nodes.map(({ id, parent }) => `${parent} ${id}`));
  const selected = Object.fromEntries(
    Object.entries(value.selected ?? {})
      .map(([parent, id]) => [own.get(parent), own.get(id)])
      .filter(([parent, id]) => children.has(`${parent} ${id}`)),
  );
  return { id: newId(), title: value.title, changed: value.changed, nodes, selected };
}

const checkedStats = (stats) =>
  stats && Number.isFinite(stats.tokens)
    ? {
        tokens: stats.tokens,
        ...(Number.isFinite(stats.speed) ? { speed: stats.speed } : {}),
        ...(Number.isFinite(stats.first) ? { first: stats.first } : {}),
      }
    : null;
