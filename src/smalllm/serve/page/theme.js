// Light, dark, or as the system says. A classic script in the head, so that the page never flashes in the other theme.
"use strict";
(() => {
  const KEY = "smalllm.theme";
  const NEXT = { system: "light", light: "dark", dark: "system" };
  const SIGN = { system: "◐", light: "☀", dark: "☾" };
  let theme = "system";
  try {
    const kept = localStorage.getItem(KEY);
    if (kept === "light" || kept === "dark") theme = kept;
  } catch { /* storage is switched off: the choice lasts until the page is left */ }
  document.documentElement.dataset.theme = theme;

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const show = () => {
      document.documentElement.dataset.theme = theme;
      button.textContent = SIGN[theme];
      button.title = `Theme: ${theme}`;
      button.setAttribute("aria-label", `Theme: ${theme}. Change to ${NEXT[theme]}`);
    };
    button.addEventListener("click", () => {
      theme = NEXT[theme];
      try { localStorage.setItem(KEY, theme); } catch { /* as above */ }
      show();
    });
    show();
  });
})();
