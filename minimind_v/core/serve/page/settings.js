// How answers are sampled, and how the page looks. An empty field is not sent: then the server decides.
import { fill, h } from "./dom.js";
import { t } from "./strings.js";

// name in a request · name of its sentences · least · most · step of the arrows
const FIELDS = [
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "TopP", 0.01, 1, 0.01],
  ["top_k", "TopK", 0, null, 1],
  ["min_p", "MinP", 0, 1, 0.01],
  ["repetition_penalty", "Repetition", 0.01, 10, 0.05],
  ["max_tokens", "MaxTokens", 1, null, 1],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1],
];

/** Small things that outlive the page where the browser allows it. */
export const memory = {
  get: (name) => {
    try {
      return localStorage.getItem(`mmv.${name}`);
    } catch {
      return null;
    }
  },
  set: (name, value) => {
    try {
      value == null ? localStorage.removeItem(`mmv.${name}`) : localStorage.setItem(`mmv.${name}`, value);
    } catch {}
  },
};

const isValid = (value, least, most, step) =>
  Number.isFinite(value) && value >= least && (most === null || value <= most) && (step < 1 || Number.isInteger(value));

export class Settings {
  constructor() {
    try {
      this.stored = Object(JSON.parse(memory.get("settings")));
    } catch {
      this.stored = {};
    }
  }

  get system() {
    return typeof this.stored.system === "string" ? this.stored.system.trim() : "";
  }

  /** The fields of a request that are set, for a model: `think` only where it can. */
  values(model) {
    const set = FIELDS.filter(([name, , ...range]) => isValid(this.stored[name], ...range)).map(([name]) => [
      name,
      this.stored[name],
    ]);
    if (model.mmv?.thinks && this.stored.think) set.push(["think", true]);
    return Object.fromEntries(set);
  }

  /** Open the panel for a model. */
  open(model) {
    const dialog = document.getElementById("settings");
    const reset = () => {
      this.stored = {};
      this.#save();
      this.open(model);
    };
    fill(
      dialog,
      t("settings"),
      h("p", { class: "note" }, t("setIntro")),
      this.#system(),
      h(
        "div",
        { class: "fields" },
        FIELDS.map((field) => this.#number(...field)),
      ),
      model?.mmv?.thinks && this.#think(),
      h("button", { type: "button", class: "wide", onclick: reset }, t("setReset")),
    );
    if (!dialog.open) dialog.showModal();
  }

  #set(name, value) {
    if (value === null) delete this.stored[name];
    else this.stored[name] = value;
    this.#save();
  }

  #save() {
    memory.set("settings", JSON.stringify(this.stored));
  }

  #system() {
    const input = h("textarea", {
      id: "set-system",
      rows: 3,
      placeholder: t("setDefault"),
      "aria-describedby": "set-system-hint",
      oninput: () => this.#set("system", input.value || null),
    });
    input.value = this.stored.system ?? "";
    return h(
      "div",
      { class: "field" },
      h("label", { for: "set-system" }, t("setSystem")),
      input,
      h("p", { class: "note", id: "set-system-hint" }, t("setSystemHint")),
    );
  }

  #number(name, words, least, most, step) {
    const id = `set-${name}`;
    const hint = h("p", { class: "note", id: `${id}-hint` }, t(`set${words}Hint`));
    const check = () => {
      const isEmpty = input.value === "" && !input.validity.badInput;
      const value = isEmpty ? null : input.valueAsNumber;
      const bad = !isEmpty && !isValid(value, least, most, step);
      input.setAttribute("aria-invalid", bad);
      hint.textContent = bad
        ? t(most === null ? "setInvalidFrom" : "setInvalid", { min: least, max: most })
        : t(`set${words}Hint`);
      hint.classList.toggle("problem", bad);
      this.#set(name, bad ? null : value);
    };
    const input = h("input", {
      id,
      type: "number",
      min: least,
      max: most,
      step: "any",
      inputmode: step < 1 ? "decimal" : "numeric",
      placeholder: t("setDefault"),
      "aria-describedby": hint.id,
      oninput: check,
    });
    input.value = this.stored[name] ?? "";
    return h("div", { class: "field" }, h("label", { for: id }, t(`set${words}`)), input, hint);
  }

  #think() {
    const input = h("input", {
      id: "set-think",
      type: "checkbox",
      checked: Boolean(this.stored.think),
      "aria-describedby": "set-think-hint",
      onchange: () => this.#set("think", input.checked || null),
    });
    return h(
      "div",
      { class: "field" },
      h("label", { class: "check" }, input, t("setThink")),
      h("p", { class: "note", id: "set-think-hint" }, t("setThinkHint")),
    );
  }
}
