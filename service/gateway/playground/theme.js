// The colour theme: light, dark or the system's. Not a module, because it must run before the first paint.

(() => {
  const KEY = "patchforge-theme";
  const ORDER = ["system", "light", "dark"];
  let theme = "system";
  try { theme = localStorage.getItem(KEY) ?? theme; } catch { /* storage is off: use the system's theme */ }

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
      try { localStorage.setItem(KEY, theme); } catch { /* storage is off: lasts until the page closes */ }
      apply();
    });
  });
})();
