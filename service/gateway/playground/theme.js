// Light, dark, or as the system has it. Runs before the first paint; not a module, because those run after it.

(() => {
  const KEY = "patchforge-theme";
  const ORDER = ["system", "light", "dark"];
  let theme = "system";
  try { theme = localStorage.getItem(KEY) ?? theme; } catch { /* storage is switched off: nothing to remember */ }

  const apply = () => {
    document.documentElement.dataset.theme = theme;
    const button = document.getElementById("theme");
    if (button) button.setAttribute("aria-label", `Theme: ${theme}`);
    if (button) button.title = `Theme: ${theme}`;
  };
  apply();

  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
      try { localStorage.setItem(KEY, theme); } catch { /* then it holds until the page is left */ }
      apply();
    });
  });
})();
