"use strict";
(() => {
  const PAGES_AT_ONCE = 24;
  const OUTLINE_PX = 4;
  const MIN_VISIBLE_PX = 160;  // of the pages of a cell: what they are, and the first pictures
  const data = JSON.parse(document.getElementById("data").textContent);
  const pages = data.pages.map(([row, id, fold, target, top]) => ({ row, id, fold, target, top }));
  const count = (number) => `${number.toLocaleString("en")} ${number === 1 ? "page" : "pages"}`;

  // What a user wrote may be of either direction, so it must not mix with the text around it.
  function isolate(text) {
    const element = document.createElement("bdi");
    element.textContent = text;
    return element;
  }

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
    find(".id bdi").textContent = find(".id bdi").title = page.id;
    find(".label bdi").textContent = data.classes[page.target];
    find(".label span").textContent = `fold ${page.fold}`;
    find(".top").append(...page.top.map((entry) => buildProbability(page, ...entry)));
    return card;
  }

  function buildProbability(page, column, probability) {
    const item = document.createElement("li");
    item.classList.toggle("is-label", column === page.target);
    item.classList.toggle("is-mistake", column !== page.target && column === page.top[0][0]);
    const name = isolate(data.classes[column]);
    name.className = "name";
    name.title = data.classes[column];
    const [value, track, fill] = ["value", "track", "fill"].map((className) => {
      const part = document.createElement("span");
      part.className = className;
      return part;
    });
    value.textContent = fill.style.width = probability;
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

  const cells = document.getElementById("cells");
  if (cells) explore();

  function explore() {
    const find = (name) => document.getElementById(`pages-${name}`);
    const [region, status, list, more] = [document.getElementById("pages"), find("status"), find("list"), find("more")];
    const lines = [...cells.tBodies[0].rows]
      .map((row) => [...row.querySelectorAll("[data-cell]")])
      .filter((line) => line.length);
    const buttons = lines.flat();
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
      const [label, predicted] = [target, prediction].map((number) => isolate(data.classes[number]));
      status.replaceChildren("Label ", label, ", predicted ", predicted, `: ${count(remaining.length)}${order}.`);
      list.replaceChildren();
      region.scrollTop = 0;
      showMore();
    }

    // A click must not move the page below the pointer, unless the pages would stay out of sight.
    function reveal(isByKeyboard) {
      const { top } = region.getBoundingClientRect();
      const isBelow = top >= cells.parentElement.getBoundingClientRect().bottom;
      const isVisible = top >= 0 && top + MIN_VISIBLE_PX <= window.innerHeight;
      if (!isVisible && (isBelow || isByKeyboard)) region.scrollIntoView({ block: "start" });
    }

    for (const button of buttons) {
      button.addEventListener("click", (event) => {
        choose(button);
        const isByKeyboard = event.detail === 0;
        if (isByKeyboard) region.focus({ preventScroll: true });
        reveal(isByKeyboard);
      });
    }
    more.addEventListener("click", () => {
      const shown = list.childElementCount;
      showMore();
      const next = list.children[shown];
      next.tabIndex = -1;
      next.focus();  // the button may be gone
    });
    find("back").addEventListener("click", () => chosen.focus());
    region.addEventListener("keydown", (event) => {
      if (event.key === "Escape") chosen.focus();
    });

    // All numbers together are one stop of the Tab key.
    let stop = null;
    function makeStop(button) {
      if (stop) stop.tabIndex = -1;
      stop = button;
      stop.tabIndex = 0;
    }

    // Not every row has a number in the same column.
    function findNearest(line) {
      const distance = (button) => Math.abs(button.parentElement.cellIndex - stop.parentElement.cellIndex);
      return line && line.reduce((best, button) => (distance(button) < distance(best) ? button : best));
    }

    function findNext(key, isInTable) {
      const number = lines.findIndex((line) => line.includes(stop));
      const place = lines[number].indexOf(stop);
      const isList = buttons.length === lines.length;  // a row has no other number to go to
      const range = isInTable || isList ? buttons : lines[number];
      switch (key) {
        case "ArrowLeft": return lines[number][place - 1];
        case "ArrowRight": return lines[number][place + 1];
        case "ArrowUp": return findNearest(lines[number - 1]);
        case "ArrowDown": return findNearest(lines[number + 1]);
        case "Home": return range[0];
        case "End": return range[range.length - 1];
        default: return null;
      }
    }

    cells.addEventListener("focusin", (event) => makeStop(event.target));
    cells.addEventListener("keydown", (event) => {
      const isEnd = event.key === "Home" || event.key === "End";
      if (!isEnd && !event.key.startsWith("Arrow")) return;
      if (event.altKey || event.metaKey || event.shiftKey || (event.ctrlKey && !isEnd)) return;
      event.preventDefault();  // which would scroll
      const next = findNext(event.key, event.ctrlKey);
      if (!next) return;
      next.focus({ preventScroll: true });
      next.scrollIntoView({ block: "nearest", inline: "nearest" });
    });

    for (const button of buttons) button.tabIndex = -1;
    const mistaken = buttons.filter((button) => button.parentElement.classList.contains("miss"));
    mistaken.sort((a, b) => Number(b.textContent) - Number(a.textContent));
    choose(mistaken[0] ?? buttons[0]);
    makeStop(chosen);
    region.hidden = false;
  }

  // --- headers that stay in place must not cover what has the focus -------------------------------------------------

  for (const box of document.querySelectorAll(".scroll")) {
    const corner = box.querySelector("thead th");
    new ResizeObserver(() => {
      const [top, left] = [corner.offsetHeight, corner.offsetWidth].map((size) => size + OUTLINE_PX);
      box.style.scrollPadding = `${top}px ${OUTLINE_PX}px ${OUTLINE_PX}px ${left}px`;
    }).observe(corner);
  }

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
    const rows = [...document.getElementById("config-rows").children];
    search.addEventListener("input", () => {
      const wanted = search.value.trim().toLowerCase();
      for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      const found = rows.filter((row) => !row.hidden).length;
      const answer = found ? `${found} of ${rows.length} keys` : "nothing found";
      document.getElementById("config-status").textContent = wanted ? answer : "";
    });
  }
})();
