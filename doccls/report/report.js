"use strict";
(() => {
  const PAGES_AT_ONCE = 24;
  const data = JSON.parse(document.getElementById("data").textContent);
  const pages = data.pages.map(([row, id, fold, target, top]) => ({ row, id, fold, target, top }));
  const percent = (value) => `${(100 * value).toFixed(1)}%`;
  const count = (number) => `${number.toLocaleString("en")} ${number === 1 ? "page" : "pages"}`;

  // --- pages as cards -----------------------------------------------------------------------------------------------

  const hasThumbnails = Object.keys(data.thumbnails).length > 0;
  const template = document.getElementById("page-card");

  function buildCard(page) {
    const card = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => card.querySelector(selector);
    const content = data.thumbnails[page.row];
    if (!hasThumbnails) {
      find(".picture").remove();
    } else if (content === undefined) {
      find(".picture").textContent = "no thumbnail";
    } else {
      const image = document.createElement("img");
      image.alt = "";  // the ID beside it names the page
      image.src = `data:${data.media_type};base64,${content}`;
      find(".picture").append(image);
    }
    find(".id").textContent = find(".id").title = page.id;
    find(".label b").textContent = data.classes[page.target];
    find(".label span").textContent = `fold ${page.fold}`;
    find(".top").append(...page.top.map((entry) => buildProbability(page, ...entry)));
    return card;
  }

  function buildProbability(page, column, probability) {
    const item = document.createElement("li");
    item.classList.toggle("is-label", column === page.target);
    item.classList.toggle("is-mistake", column !== page.target && column === page.top[0][0]);
    const [name, value, track, fill] = ["name", "value", "track", "fill"].map((className) => {
      const part = document.createElement("span");
      part.className = className;
      return part;
    });
    name.textContent = name.title = data.classes[column];
    value.textContent = fill.style.width = percent(probability);
    track.append(fill);
    item.append(name, value, track);
    return item;
  }

  const mistakes = document.getElementById("mistakes-list");
  if (mistakes) {
    const pageOf = new Map(pages.map((page) => [page.row, page]));
    mistakes.append(...data.mistakes.map((row) => buildCard(pageOf.get(row))));
  }

  // --- the pages of a cell of the confusion matrix ------------------------------------------------------------------

  const status = document.getElementById("pages-status");
  const list = document.getElementById("pages-list");
  const more = document.getElementById("pages-more");
  let chosen = null;
  let remaining = [];

  function showMore() {
    list.append(...remaining.splice(0, PAGES_AT_ONCE).map(buildCard));
    more.hidden = remaining.length === 0;
    more.textContent = `Show more: ${count(remaining.length)} left`;
  }

  function choose(button) {
    if (chosen) chosen.setAttribute("aria-pressed", "false");
    chosen = button;
    chosen.setAttribute("aria-pressed", "true");
    const [target, prediction] = button.dataset.cell.split(",").map(Number);
    remaining = pages.filter((page) => page.target === target && page.top[0][0] === prediction);
    const order = remaining.length > 1 ? ", the least certain first" : "";
    const [label, predicted] = [data.classes[target], data.classes[prediction]];
    status.textContent = `Label ${label}, predicted ${predicted}: ${count(remaining.length)}${order}.`;
    list.replaceChildren();
    list.parentElement.scrollTop = 0;
    showMore();
  }

  more.addEventListener("click", () => {
    const shown = list.childElementCount;
    showMore();
    const next = list.children[shown];
    next.tabIndex = -1;
    next.focus();  // the button may be gone
  });
  for (const button of document.querySelectorAll("[data-cell]")) {
    button.addEventListener("click", () => {
      choose(button);
      list.parentElement.scrollIntoView({ block: "nearest" });
    });
  }
  const mostFrequent = [...document.querySelectorAll(".miss [data-cell]")];
  mostFrequent.sort((a, b) => Number(b.textContent) - Number(a.textContent));
  if (mostFrequent.length) choose(mostFrequent[0]);

  // --- sorting of tables --------------------------------------------------------------------------------------------

  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      header.querySelector("button").addEventListener("click", () => {
        // Worst first; a second click reverses the order.
        const direction = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", direction);
        const sign = direction === "ascending" ? 1 : -1;
        const value = (row) => Number(row.cells[column].dataset.value);
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => sign * (value(a) - value(b))));
      });
    });
  }

  // --- search in the config -----------------------------------------------------------------------------------------

  const search = document.getElementById("config-search");
  if (search) {
    const rows = [...document.getElementById("config-rows").rows];
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const found = rows.filter((row) => !row.hidden).length;
      document.getElementById("config-status").textContent = wanted ? `${found} of ${rows.length} keys` : "";
    });
  }
})();
