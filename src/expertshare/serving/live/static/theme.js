// Runs before the first paint, so that a chosen theme does not flash. Without a choice the system decides.
"use strict";

(() => {
  const KEY = "expertshare-theme";
  const NEXT = { auto: "light", light: "dark", dark: "auto" };

  function remembered() {
    try {
      const theme = localStorage.getItem(KEY);
      return theme in NEXT ? theme : "auto";
    } catch {
      return "auto"; // storage may be forbidden; the choice then lasts as long as the page
    }
  }

  let current = remembered();

  function apply(theme) {
    current = theme;
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    document.dispatchEvent(new Event("themechange"));
  }

  function show(button) {
    button.textContent = { auto: "Theme: system", light: "Theme: light", dark: "Theme: dark" }[current];
  }

  apply(current);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    show(button);
    button.addEventListener("click", () => {
      apply(NEXT[current]);
      show(button);
      try {
        localStorage.setItem(KEY, current);
      } catch {
        // not remembered, as said above
      }
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => apply(current));
  });
})();
