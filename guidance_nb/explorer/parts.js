// What both pages need: an element with its properties, and the theme around.

const make = (tag, props = {}, ...kids) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...kids);
  return node;
};

// Dark or light: what the page around says (Quarto, Jupyter), else what the system says.
function isDark() {
  const {classList, dataset} = document.body;
  if (classList.contains("quarto-dark") || dataset.jpThemeLight === "false") return true;
  if (classList.contains("quarto-light") || dataset.jpThemeLight === "true") return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}
