(() => {
  const OUTLINE_PX = 4;
  const data = JSON.parse(document.getElementById("data").textContent);
  const pages = data.pages.map(([row, id, fold, target, top]) => ({ row, id, fold, target, top }));

  // --- pages as cards -----------------------------------------------------------------------------------------------

  const template = document.getElementById("page-card");

  function buildCard(page) {
    const card = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => card.querySelector(selector);
    fillPicture(find(".picture"), data, page.row);
    find(".id bdi").textContent = find(".id bdi").title = page.id;
    find(".label bdi").textContent = data.classes[page.target];
    find(".label span").textContent = `fold ${page.fold}`;
    find(".top").append(...page.top.map(([column, probability]) => {
      const item = buildProbability(data.classes[column], probability);
      item.classList.toggle("is-label", column === page.target);
      item.classList.toggle("is-mistake", column !== page.target && column === page.top[0][0]);
      return item;
    }));
    return card;
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
    const [region, status, showPages] = [document.getElementById("pages"), find("status"), makePageList(buildCard)];
    const lines = [...cells.tBodies[0].rows]
      .map((row) => [...row.querySelectorAll("[data-cell]")])
      .filter((line) => line.length);
    const buttons = lines.flat();
    let chosen = null;

    function choose(button) {
      if (chosen) chosen.setAttribute("aria-pressed", "false");
      chosen = button;
      chosen.setAttribute("aria-pressed", "true");
      const [target, prediction] = button.dataset.cell.split(",").map(Number);
      const found = pages.filter((page) => page.target === target && page.top[0][0] === prediction);
      const order = found.length > 1 ? ", the least certain first" : "";
      const [label, predicted] = [target, prediction].map((number) => isolate(data.classes[number]));
      status.replaceChildren("Label ", label, ", predicted ", predicted, `: ${countPages(found.length)}${order}.`);
      showPages(found);
    }

    for (const button of buttons) {  // named here, since the names of all cells together may be larger than the pictures
      const [label, predicted] = button.dataset.cell.split(",").map((number) => `\u2068${data.classes[number]}\u2069`);
      const pages = countPages(Number(button.textContent));
      button.setAttribute("aria-label", `${pages}: label ${label}, predicted ${predicted}`);
      button.addEventListener("click", (event) => {
        choose(button);
        revealPages(cells.parentElement, event);
      });
    }
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
