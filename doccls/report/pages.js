// Pages of train.csv as cards; the report and the comparison share this.
const PAGES_AT_ONCE = 24;
const MIN_VISIBLE_PX = 160;  // of the pages of a cell: what they are, and the first pictures

const countPages = (number) => `${number.toLocaleString("en")} ${number === 1 ? "page" : "pages"}`;

/** Put a page's thumbnail into its card; without any thumbnails, there is no place for one. */
function fillPicture(place, data, row) {
  const content = data.thumbnails[row];
  if (Object.keys(data.thumbnails).length === 0) {
    place.remove();
  } else if (content === undefined) {
    place.textContent = "no thumbnail";
  } else {
    const image = document.createElement("img");
    image.alt = "";  // the ID beside it names the page
    image.src = `data:${data.media_type};base64,${content}`;
    place.append(image);
  }
}

/** Isolate what a user wrote, which may be of either direction, from the text around it. */
function isolate(text) {
  const element = document.createElement("bdi");
  element.textContent = text;
  return element;
}

/** Return a list item with a name, a probability such as `12.3%`, and a bar of its length. */
function buildProbability(text, probability) {
  const item = document.createElement("li");
  const name = isolate(text);
  name.className = "name";
  name.title = text;
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

/** Show the list of pages after a choice in `box`: focus it after a key, but move nothing below the pointer. */
function revealPages(box, event) {
  const region = document.getElementById("pages");
  const isByKeyboard = event.detail === 0;
  if (isByKeyboard) region.focus({ preventScroll: true });
  const { top } = region.getBoundingClientRect();
  const isBelow = top >= box.getBoundingClientRect().bottom;
  const isVisible = top >= 0 && top + MIN_VISIBLE_PX <= window.innerHeight;
  if (!isVisible && (isBelow || isByKeyboard)) region.scrollIntoView({ block: "start" });
}

/** Return a function that shows pages in the list of the page, some at a time. */
function makePageList(buildCard) {
  const list = document.getElementById("pages-list");
  const more = document.getElementById("pages-more");
  let remaining = [];

  function showMore() {
    list.append(...remaining.splice(0, PAGES_AT_ONCE).map(buildCard));
    more.hidden = remaining.length === 0;
    more.textContent = `Show more: ${countPages(remaining.length)} left`;
  }

  more.addEventListener("click", () => {
    const shown = list.childElementCount;
    showMore();
    const next = list.children[shown];
    next.tabIndex = -1;
    next.focus();  // the button may be gone
  });
  return (pages) => {
    remaining = [...pages];
    list.replaceChildren();
    list.parentElement.scrollTop = 0;
    showMore();
  };
}
