"use strict";

// The headers of sortable tables become buttons; without scripts the tables keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortByColumn(table, headers, column));
    header.append(button);
  });
}

function sortByColumn(table, headers, column) {
  const header = headers[column];
  const firstOrder = header.classList.contains("number") ? "descending" : "ascending";
  const secondOrder = firstOrder === "descending" ? "ascending" : "descending";
  const order = header.getAttribute("aria-sort") === firstOrder ? secondOrder : firstOrder;
  headers.forEach((each) => each.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", order);
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compareValues(a.cells[column].dataset.value, b.cells[column].dataset.value, order));
  table.tBodies[0].append(...rows);
}

// Rows without a score have an empty value and are last in both orders.
function compareValues(a, b, order) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  return order === "ascending" ? difference : -difference;
}

// Tables and charts that are wider or higher than their frame fade at the edges beyond which they continue.
for (const frame of document.querySelectorAll(".scroll")) {
  const update = () => {
    frame.classList.toggle("more-left", frame.scrollLeft > 1);
    frame.classList.toggle("more-right", frame.scrollLeft + frame.clientWidth < frame.scrollWidth - 1);
    frame.classList.toggle("more-below", frame.scrollTop + frame.clientHeight < frame.scrollHeight - 1);
  };
  frame.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(frame);
}

const themeButton = document.querySelector(".theme");
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});

// Collapsed parts are opened for printing.
let closedDetails = [];
addEventListener("beforeprint", () => {
  closedDetails = [...document.querySelectorAll("details:not([open])")];
  closedDetails.forEach((details) => (details.open = true));
});
addEventListener("afterprint", () => closedDetails.forEach((details) => (details.open = false)));
