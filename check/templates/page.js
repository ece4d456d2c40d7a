"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const numeric = heading.classList.contains("n");
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : numeric;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const value = (row) => {
        const cell = row.cells[column];
        return numeric ? parseFloat(cell.dataset.v) : cell.textContent.trim();
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y); // what is not known comes last
        const order = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
        return descending ? -order : order;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(compare));
    });
  });
}
