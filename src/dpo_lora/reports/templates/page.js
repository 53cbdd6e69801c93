"use strict";
// Tables with the class "sortable" sort by a click on a heading; a filter hides rows that lack its words.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return a === b ? 0 : a === "" ? 1 : -1; // what is missing comes last, either way
        const [x, y] = [Number(a), Number(b)];
        const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
        return descending ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const filter of document.querySelectorAll(".filter")) {
  const rows = [...document.querySelector("table.sortable").tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const [words, count] = ["input", "output"].map((name) => filter.querySelector(name));
  const choices = [...filter.querySelectorAll("select")];
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      const fits = wanted.every((word) => texts[number].includes(word));
      row.hidden = !fits || choices.some(({ name, value }) => value !== "" && row.dataset[name] !== value);
      shown += row.hidden ? 0 : 1;
    });
    count.textContent = `${shown} of ${rows.length}`;
  };
  words.addEventListener("input", apply);
  filter.addEventListener("submit", (event) => event.preventDefault());
  for (const choice of choices) choice.addEventListener("change", apply);
  apply();
}
// On paper nothing can be unfolded.
for (const [event, open] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => document.querySelectorAll("details.print").forEach((part) => (part.open = open)));
}
