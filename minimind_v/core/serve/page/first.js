// Runs before the first paint, so that no page appears in the wrong theme or language.
(() => {
  let stored = {};
  try {
    stored = { theme: localStorage.getItem("mmv.theme"), language: localStorage.getItem("mmv.language") };
  } catch {}
  const root = document.documentElement;
  if (stored.theme === "light" || stored.theme === "dark") root.dataset.theme = stored.theme;
  root.lang = stored.language || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
})();
