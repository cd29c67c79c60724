// Elements, icons, and small things that every module shows. Text is always set as text, never as HTML.
import { t } from "./strings.js";

/** An element. `on…` attributes are listeners; true and false set or leave out an attribute; texts become nodes. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return element;
}

const PATHS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  menu: "M4 7h16M4 12h16M4 17h10",
  image: "M4 6a2 2 0 0 1 2-2h12a2 2 0 0 1 2 2v12a2 2 0 0 1-2 2H6a2 2 0 0 1-2-2zM4 16l4.5-4.5 4 4L16 12l4 4M9 8.5v.01",
  camera: "M4 8h3.5L9 5.5h6L16.5 8H20v11H4zM12 10a3.2 3.2 0 1 0 0 6.4 3.2 3.2 0 0 0 0-6.4z",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  retry: "M20 11a8 8 0 1 0-2.3 6.2M20 5v6h-6",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  look: "M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM16 16l4.5 4.5M8 11h6M11 8v6",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  import: "M12 4v11M7 10l5 5 5-5M5 20h14",
  export: "M12 15V4M7 9l5-5 5 5M5 20h14",
  sliders: "M5 4v6M5 14v6M12 4v2M12 10v10M19 4v9M19 17v3M2.5 12h5M9.5 8h5M16.5 15h5",
  keyboard: "M3 7h18v10H3zM7 10.5v.01M11 10.5v.01M15 10.5v.01M18 10.5v.01M8 14h8",
  light:
    "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M18.7 5.3l-1.4 1.4M6.7 17.3l-1.4 1.4",
  dark: "M19.5 14.5A8 8 0 0 1 9.5 4.5a8 8 0 1 0 10 10z",
  system: "M4 5h16v11H4zM9 20h6M12 16v4",
};

export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button of an icon with its name for screen readers and as a tooltip, or of an icon and visible text. */
export function button(symbol, text, onclick, { visible = false, ...attributes } = {}) {
  const label = visible ? {} : { "aria-label": text, title: text };
  const style = visible ? "" : "icon";
  return h(
    "button",
    { type: "button", class: style, onclick, ...label, ...attributes },
    icon(symbol),
    visible && h("span", {}, text),
  );
}

/** Give the fixed parts of the page their words and icons, in today's language. */
export function translate(root = document) {
  for (const element of root.querySelectorAll("[data-text],[data-icon],[data-label]")) {
    const { text, icon: symbol, label } = element.dataset;
    if (text || symbol)
      element.replaceChildren(...(symbol ? [icon(symbol)] : []), ...(text ? [h("span", {}, t(text))] : []));
    if (label) {
      element.setAttribute("aria-label", t(label));
      if (element.matches("button, select")) element.title = t(label);
    }
  }
}

/** Fill a dialog: a title, a button that closes it, and its content. */
export function fill(dialog, title, ...content) {
  const close = button("close", t("close"), () => dialog.close());
  const shown = content.filter((child) => child != null && child !== false);
  dialog.replaceChildren(h("div", { class: "bar" }, h("h2", { id: `${dialog.id}-title` }, title), close), ...shown);
}

/** Say something for a while; `action` is a word and what happens when it is chosen. */
export function toast(text, action = null, seconds = 7) {
  const element = h("div", { class: "toast" }, h("span", {}, text));
  const remove = () => element.remove();
  if (action)
    element.append(
      h(
        "button",
        {
          type: "button",
          onclick: () => {
            remove();
            action.run();
          },
        },
        action.text,
      ),
    );
  element.append(button("close", t("close"), remove));
  document.getElementById("toasts").append(element);
  let timer = setTimeout(remove, seconds * 1000);
  // Nobody must hurry: while it is read or has the focus it stays.
  for (const event of ["pointerenter", "focusin"]) element.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["pointerleave", "focusout"])
    element.addEventListener(event, () => {
      clearTimeout(timer);
      timer = setTimeout(remove, 3000);
    });
}

/** Let a screen reader say something when it has time. */
export const announce = (text) => {
  document.getElementById("announcer").textContent = text;
};
