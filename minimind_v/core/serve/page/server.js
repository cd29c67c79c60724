// Whether the server is there. It is asked only after a failure, ever more seldom, and at once when there is a reason.
const LONGEST = 30; // seconds between two tries

/**
 * `answers()` asks whether the page can work with the server. Reports `changed({ gone, wait })` with the seconds until the
 * next try (null: trying now).
 */
export class Server {
  constructor(answers, changed) {
    Object.assign(this, { answers, changed });
    this.gone = false;
    addEventListener("online", () => this.tryNow());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.tryNow();
    });
  }

  /** A call failed: if the server is gone, and not only that call's connection, ask until it is back. */
  async lost() {
    if (this.gone || this.trying) return;
    this.trying = true;
    const answers = await this.answers();
    this.trying = false;
    if (answers) return;
    this.gone = true;
    this.delay = 1;
    this.#countdown(this.delay);
  }

  tryNow() {
    if (this.gone && !this.trying) this.#try();
  }

  #countdown(seconds) {
    this.changed({ gone: true, wait: seconds });
    clearTimeout(this.timer);
    this.timer = setTimeout(() => (seconds > 1 ? this.#countdown(seconds - 1) : this.#try()), 1000);
  }

  async #try() {
    clearTimeout(this.timer);
    this.trying = true;
    this.changed({ gone: true, wait: null });
    const answers = await this.answers();
    this.trying = false;
    if (answers) {
      this.gone = false;
      this.changed({ gone: false, wait: null });
    } else {
      this.delay = Math.min(2 * this.delay, LONGEST);
      this.#countdown(this.delay);
    }
  }
}
