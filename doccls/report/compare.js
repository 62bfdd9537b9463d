(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const pageOf = new Map(
    data.pages.map(([row, id, target, predictions]) => [row, { row, id, target, predictions }]),
  );
  const template = document.getElementById("page-card");

  function buildCard(page) {
    const card = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => card.querySelector(selector);
    fillPicture(find(".picture"), data, page.row);
    find(".id bdi").textContent = find(".id").title = page.id;
    find(".label bdi").textContent = data.classes[page.target];
    find(".top").append(...page.predictions.map(([column, probability], number) => {
      const item = buildProbability(data.classes[column], probability);
      item.classList.add(column === page.target ? "is-label" : "is-mistake");
      const letter = document.createElement("span");
      letter.className = `letter key key-${number % 8}`;
      letter.textContent = data.letters[number];
      item.querySelector(".name").replaceChildren(letter, " ", isolate(data.classes[column]));
      return item;
    }));
    return card;
  }

  const status = document.getElementById("pages-status");
  const showPages = makePageList(buildCard);
  let chosen = null;

  function choose(button) {
    if (chosen) chosen.setAttribute("aria-pressed", "false");
    chosen = button;
    chosen.setAttribute("aria-pressed", "true");
    const [letter, outcome] = button.dataset.cell.split(",");
    const rows = data.outcomes[letter][Number(outcome)];
    const order = rows.length > 1 ? ", the most confident first" : "";
    status.textContent = `${button.dataset.title}: ${countPages(rows.length)}${order}.`;
    showPages(rows.map((row) => pageOf.get(row)));
  }

  const buttons = [...document.querySelectorAll("[data-cell]")];
  for (const button of buttons) {
    button.addEventListener("click", (event) => {
      choose(button);
      revealPages(button.closest(".scroll"), event);
    });
  }
  document.getElementById("pages").addEventListener("keydown", (event) => {
    if (event.key === "Escape" && chosen) chosen.focus();
  });
  if (buttons.length) choose(buttons[0]);
})();
