"use strict";
// Everything that comes from the store is put in as text: `make` knows no markup.
const facts = JSON.parse(document.getElementById("facts").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "polyline", "line", "rect", "text", "title"].includes(name);
  const node = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
const number = (value) => value.toLocaleString("en", { maximumFractionDigits: 4 });
const at = (id) => document.getElementById(id);

function table(head, rows) {
  return make("table", { class: head.length ? "headed" : null },
    head.length ? make("thead", {}, make("tr", {}, ...head.map((cell) => make("th", { scope: "col" }, cell)))) : null,
    make("tbody", {}, ...rows.map(([first, ...rest]) => make("tr", {}, make("th", { scope: "row" }, first),
      ...rest.map((cell) => make("td", typeof cell === "number" ? { class: "number" } : {},
        typeof cell === "number" ? number(cell) : cell))))));
}

