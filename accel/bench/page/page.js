"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

for (const box of all(".slider")) {
  const range = box.querySelector("input[type=range]");
  const name = box.querySelector("[data-name]");
  const move = () => {
    box.style.setProperty("--at", `${range.value}%`);
    range.setAttribute("aria-valuetext", `eager ${range.value} %, ${name.textContent} ${100 - range.value} %`);
  };
  range.addEventListener("input", move);
  move();
  box.addEventListener("chosen", (event) => { name.textContent = event.detail; move(); });
}

for (const block of all(".prompt")) {
  block.addEventListener("change", (event) => {
    if (event.target.type !== "radio") return;
    for (const part of all("[data-variant]", block)) part.hidden = part.dataset.variant !== event.target.value;
    block.querySelector(".slider").dispatchEvent(new CustomEvent("chosen", { detail: event.target.value }));
  });
}

const theme = document.getElementById("theme");
const dark = () => (document.documentElement.dataset.theme
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const label = () => {
  theme.textContent = dark() ? "Light" : "Dark";
  theme.setAttribute("aria-label", `Use the ${dark() ? "light" : "dark"} colours`);
};
theme.removeAttribute("aria-pressed");
theme.hidden = false;
theme.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; label(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
label();

for (const button of all("[data-copy]")) {
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "Selected: copy it with the keyboard";
    }
  });
}

const save = document.getElementById("save");
save.hidden = false;
save.addEventListener("click", () => {
  const file = new Blob([document.getElementById("document").textContent], { type: "application/json" });
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(file), download: "bench.json" });
  link.click();
  URL.revokeObjectURL(link.href);
});
