// Runs before anything is drawn, so that a chosen scheme does not flash.
"use strict";
try {
  const chosen = localStorage.getItem("megavlm.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch {
  // Storage is switched off: the system's scheme it is.
}
