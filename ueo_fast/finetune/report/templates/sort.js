for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const number = head.classList.contains("number");
    const key = (row) => {
      const text = row.cells[column].textContent.trim();
      return number ? parseFloat(text.replace("\u2212", "-").replace(/,/g, "")) : text;
    };
    const compare = (a, b) => (number ? (isNaN(a) ? -Infinity : a) - (isNaN(b) ? -Infinity : b) || 0
      : a.localeCompare(b, undefined, { numeric: true }));
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort((a, b) => order * compare(a[0], b[0]));
      body.append(...rows.map((one) => one[1]));
    });
  });
}
