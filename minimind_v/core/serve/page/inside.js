// Looking inside an answer: the server traces it, and the viewer shows the trace in a panel.
import { look } from "./api.js";
import { fill, h } from "./dom.js";
import { language, t } from "./strings.js";

const VIEWER = "/page/look.js",
  STYLE = "/page/look.css";

/** Whether the server has the viewer. */
export const hasViewer = async () =>
  fetch(VIEWER, { method: "HEAD" }).then(
    ({ ok }) => ok,
    () => false,
  );

/** Open the panel for an answer: a request `{ model, messages, answer, max_tokens }`. */
export async function lookInside(request) {
  const dialog = document.getElementById("look");
  const controller = new AbortController();
  let asking = new AbortController();
  const body = h(
    "div",
    { class: "look-body" },
    h("p", { class: "status" }, h("span", { class: "spinner" }), t("lookComputing")),
  );
  fill(dialog, t("look"), body);
  dialog.onclose = () => {
    controller.abort();
    asking.abort();
    dialog.replaceChildren();
  };
  dialog.showModal();
  if (!document.querySelector(`link[href="${STYLE}"]`))
    document.head.append(h("link", { rel: "stylesheet", href: STYLE }));
  try {
    const [{ mount }, trace] = await Promise.all([import(VIEWER), look(request, controller.signal)]);
    if (!dialog.open) return;
    const { answer: _, ...question } = request; // with patches painted over, the model answers anew
    const ask = (change) => {
      asking.abort(); // the server traces one answer at a time: an earlier one must not keep this one waiting
      asking = new AbortController();
      return look({ ...question, ...change }, asking.signal);
    };
    body.replaceChildren();
    mount(body, trace, { ask, language: language() });
  } catch (error) {
    if (!controller.signal.aborted)
      body.replaceChildren(
        h(
          "p",
          { class: "notice problem", role: "alert" },
          error.message || t("serverError", { status: error.status ?? "" }),
        ),
      );
  }
}
