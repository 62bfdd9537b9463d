(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const pages = data.pages.map(([row, id, fold, target, top]) => ({ row, id, fold, target, top }));

  // --- pages as cards -----------------------------------------------------------------------------------------------

  const template = document.getElementById("page-card");

  function buildCard(page) {
    const card = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => card.querySelector(selector);
    fillPicture(find(".picture"), data, page.row);
    find(".id").textContent = find(".id").title = page.id;
    find(".label b").textContent = data.classes[page.target];
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

  const status = document.getElementById("pages-status");
  const showPages = makePageList(buildCard);
  let chosen = null;

  function choose(button) {
    if (chosen) chosen.setAttribute("aria-pressed", "false");
    chosen = button;
    chosen.setAttribute("aria-pressed", "true");
    const [target, prediction] = button.dataset.cell.split(",").map(Number);
    const found = pages.filter((page) => page.target === target && page.top[0][0] === prediction);
    const order = found.length > 1 ? ", the least certain first" : "";
    const [label, predicted] = [data.classes[target], data.classes[prediction]];
    status.textContent = `Label ${label}, predicted ${predicted}: ${countPages(found.length)}${order}.`;
    showPages(found);
  }

  for (const button of document.querySelectorAll("[data-cell]")) {
    button.addEventListener("click", () => {
      choose(button);
      document.getElementById("pages").scrollIntoView({ block: "nearest" });
    });
  }
  const mostFrequent = [...document.querySelectorAll(".miss [data-cell]")];
  mostFrequent.sort((a, b) => Number(b.textContent) - Number(a.textContent));
  if (mostFrequent.length) choose(mostFrequent[0]);

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
