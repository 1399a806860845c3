"use strict";
// Everything can be read without this script: it copies commands and shows the layer that is chosen.
for (const block of document.querySelectorAll("pre.how")) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.setAttribute("aria-live", "polite");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.textContent);
    } catch {
      getSelection().selectAllChildren(block);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C";
      return;
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  block.after(button);
}
for (const select of document.querySelectorAll("select[data-picks]")) {
  const panels = document.querySelectorAll(`[data-panel="${select.dataset.picks}"]`);
  const show = () => panels.forEach((panel, index) => { panel.hidden = index !== select.selectedIndex; });
  select.closest("[hidden]").hidden = false;
  select.addEventListener("change", show);
  show();
}
