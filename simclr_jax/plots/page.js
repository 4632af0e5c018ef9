// The page's own script: images by their rows in one sprite, and labels by keys.
const $ = (id) => document.getElementById(id);
const { images, sprite } = DATA;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function describe(row) {
  const { class: label, prediction } = DATA.columns;
  const parts = [images.names[row]];
  if (label && label[row] >= 0) parts.push(DATA.classes[label[row]]);
  if (prediction && prediction[row] >= 0) parts.push("predicted: " + DATA.classes[prediction[row]]);
  return parts.join(" · ");
}

// A thumbnail from the sprite; a click, or Enter, shows the image and its neighbours.
function thumb(row, caption, scale = 1) {
  const side = sprite.size * scale;
  const x = (row % sprite.columns) * side, y = Math.floor(row / sprite.columns) * side;
  const picture = make("button", { className: "thumb", title: describe(row), ariaLabel: describe(row), onclick: () => show(row) });
  Object.assign(picture.style, {
    width: side + "px", height: side + "px", backgroundPosition: `-${x}px -${y}px`,
    backgroundSize: sprite.columns * side + "px auto",
  });
  const figure = make("figure", {}, picture, make("figcaption", { textContent: caption ?? "" }));
  figure.style.width = Math.max(side, 56) + "px";
  return figure;
}

// Shows the image at a point of the map, and its nearest images.
function show(row) {
  const near = images.nearest[row].map((other, rank) => thumb(other, images.similarities[row][rank].toFixed(3)));
  $("panel").replaceChildren(
    thumb(row, describe(row), Math.max(1, Math.round(128 / sprite.size))),
    make("p", { textContent: "Its nearest images, and their similarity:" }),
    make("div", { className: "rows" }, ...near),
  );
  $("panel").dataset.row = row;
}

// Colours of the points, and their legend: the last colour of the palette is for points without a number.
function colourBy(choice) {
  const numbers = DATA.columns[choice], unknown = DATA.palette.length - 1;
  const colour = (number) => DATA.palette[number < 0 ? unknown : number % unknown];
  const points = Bokeh.documents[0].get_model_by_name("points");
  points.data.colour = numbers.map(colour);
  points.change.emit();
  const counts = new Map();
  for (const number of numbers) counts.set(number, (counts.get(number) ?? 0) + 1);
  const present = [...counts.keys()].sort((one, other) => (one < 0) - (other < 0) || one - other);
  const name = (number) => number < 0 ? "none" : choice === "cluster" ? "cluster " + (number + 1) : DATA.classes[number];
  const entries = present.slice(0, 40).map((number) => {
    const swatch = make("i", {});
    swatch.style.background = colour(number);
    return make("span", {}, swatch, `${name(number)} (${counts.get(number).toLocaleString("en")})`);
  });
  if (present.length > 40) entries.push(make("span", { textContent: `and ${present.length - 40} more` }));
  $("legend").replaceChildren(...entries);
}

$("colour").onchange = (event) => colourBy(event.target.value);
window.addEventListener("load", () => {
  const wait = () => Bokeh.documents[0]?.get_model_by_name("points") ? colourBy($("colour").value) : setTimeout(wait, 50);
  wait();
});
show(0);
for (const group of DATA.duplicates) {
  const shown = group.slice(0, 60).map((row) => thumb(row, images.names[row]));
  const more = group.length > 60 ? [make("span", { textContent: `and ${group.length - 60} more` })] : [];
  $("duplicate-groups").append(make("div", { className: "group" }, ...shown, ...more));
}
for (const row of DATA.outliers) $("outlier-rows").append(thumb(row, images.names[row]));
for (const doubt of DATA.doubts) {
  const caption = make("figcaption", { textContent: `${doubt.name}: ${doubt.caption}` });
  const figure = make("figure", {}, make("img", { src: doubt.url, alt: doubt.name }), caption);
  figure.style.width = "112px";
  $("doubt-rows").append(figure);
}

// Labels are kept in the browser, by run and suggested images, so that a reload loses none.
if ($("labels")) {
  const key = "simclr-labels-" + DATA.id;
  const state = { classes: "", labels: {}, done: [], ...JSON.parse(localStorage.getItem(key) ?? "{}") };
  const names = () => [...new Set(state.classes.split(",").map((name) => name.trim()).filter(Boolean))];
  const next = () => DATA.suggested.findIndex((_, place) => !state.done.includes(place));

  function answer(label) {
    const place = next();
    if (place < 0) return;
    if (label !== null) state.labels[place] = label;
    state.done.push(place);
    draw();
  }

  function undo() {
    delete state.labels[state.done.pop()];
    draw();
  }

  function csv() {
    const quoted = (text) => (/[",\n\r]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const rows = DATA.suggested.map((image, place) =>
      [image.cell, state.labels[place] ?? "", image.split, image.index].map(String).map(quoted).join(","),
    );
    return ["\ufeffname,label,split,index", ...rows, ""].join("\n");
  }

  function draw() {
    localStorage.setItem(key, JSON.stringify(state));
    const place = next(), image = DATA.suggested[place];
    $("large").hidden = !image;
    if (image) Object.assign($("large"), { src: image.url, alt: image.name });
    const count = Object.keys(state.labels).length;
    $("progress").textContent =
      `${count} of ${DATA.suggested.length} labelled` + (image ? `: ${image.name}` : ". Download them now.");
    const buttons = names().map((name, number) =>
      make("button", { textContent: (number < 9 ? number + 1 + "  " : "") + name, onclick: () => answer(name) }),
    );
    if (!buttons.length) buttons.push(make("em", { textContent: "Type the names of the classes first." }));
    buttons.push(make("button", { textContent: "s  skip", onclick: () => answer(null) }));
    buttons.push(make("button", { textContent: "u  undo", onclick: undo, disabled: !state.done.length }));
    $("keys").replaceChildren(...buttons);
    $("download").href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  }

  $("classes").value = state.classes;
  $("classes").oninput = (event) => { state.classes = event.target.value; draw(); };
  $("classes").onkeydown = (event) => { if (event.key === "Enter") event.target.blur(); };
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || event.ctrlKey || event.metaKey) return;
    const name = /^[1-9]$/.test(event.key) ? names()[event.key - 1] : undefined;
    if (name) answer(name);
    else if (event.key === "s") answer(null);
    else if (event.key === "u" || event.key === "Backspace") undo();
  });
  draw();
}
