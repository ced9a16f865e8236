"use strict";

// Sorts, filters and shortens the tables. Without scripts they are whole and in their first order.
const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

for (const box of document.querySelectorAll(".data")) {
  const body = box.querySelector("tbody");
  const heads = [...box.querySelectorAll("thead th")];
  const search = box.querySelector("input");
  const verdict = box.querySelector("select");
  const count = box.querySelector("output");
  const more = box.querySelector(".more");
  const step = Number(box.dataset.limit);
  let rows = [...body.rows];
  let limit = step;
  const texts = new Map(rows.map(row => [row, [...row.cells].map(cell => cell.textContent).join("\n").toLowerCase()]));

  function show() {
    const wanted = search ? search.value.trim().toLowerCase() : "";
    const kind = verdict ? verdict.value : "";
    const found = rows.filter(row => texts.get(row).includes(wanted) && (!kind || row.dataset.verdict === kind));
    body.replaceChildren(...found.slice(0, limit));
    if (count) count.textContent = `${found.length} of ${rows.length} ${count.dataset.unit}`;
    const left = Math.min(step, found.length - limit);
    more.parentElement.hidden = left <= 0;
    more.textContent = `show ${left} more`;
  }

  // Numbers by size, dashes last in either direction, and names by their letters.
  function sort(index) {
    const head = heads[index];
    const down = head.getAttribute("aria-sort") === "ascending";
    const words = head.classList.contains("words");
    const key = row => words ? row.cells[index].textContent : Number.parseFloat(row.cells[index].textContent);
    const keys = new Map(rows.map(row => [row, key(row)]));
    const sign = down ? -1 : 1;
    rows.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      if (words) return sign * collator.compare(x, y);
      return Number.isNaN(x) - Number.isNaN(y) || sign * (x - y) || 0;
    });
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    show();
  }

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(index));
    head.replaceChildren(button);
  });
  for (const control of [search, verdict]) {
    if (control) control.addEventListener("input", () => { limit = step; show(); });
  }
  more.addEventListener("click", () => { limit += step; show(); });
  for (const tools of box.querySelectorAll(".tools")) tools.hidden = false;
  show();
}
