// The page's own script: images by their rows in one sprite, and labels by keys.
const $ = (id) => document.getElementById(id);
const { images, sprite } = DATA;

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const unique = (names) => [...new Set(names.filter(Boolean))];
// The classes in a label. Where an image may have several, it joins them as in "a;b", and ";" is none of them.
const partsOf = (label) => (DATA.several ? unique(label.split(";").map((name) => name.trim())) : [label]);
const joined = (names) => unique(names).sort().join(";") || ";";
const spoken = (label) => (partsOf(label).length ? label : "none");

function describe(row) {
  const { class: label, prediction } = DATA.columns;
  const parts = [images.names[row]];
  if (label && label[row] >= 0) parts.push(spoken(DATA.classes[label[row]]));
  if (prediction && prediction[row] >= 0) parts.push("predicted: " + spoken(DATA.classes[prediction[row]]));
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
  const name = (number) => number < 0 ? "none" : choice === "cluster" ? "cluster " + (number + 1) : spoken(DATA.classes[number]);
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

// Labels are kept in the browser, by run: a reload loses none, nor does a page that was made anew.
const key = "simclr-labels-" + DATA.id;
const state = { classes: [], seen: [], labels: {}, skipped: [], history: [], hand: null };
let keeps = true;
try {
  Object.assign(state, JSON.parse(localStorage.getItem(key) ?? "{}"));
} catch {
  keeps = false; // The browser, or the frame around the page, allows no storage.
}
const labelOf = (name) => state.labels[name] ?? DATA.given[name];
// The image to label: that in hand, whose classes are not yet confirmed by Enter, or the first without a label.
const next = () => DATA.suggested.find(({ name }) => name === state.hand)
  ?? DATA.suggested.find(({ name }) => !labelOf(name) && !state.skipped.includes(name));
const added = unique(DATA.classes.flatMap(partsOf)).filter((name) => !state.seen.includes(name)); // A renamed class does not come back.
state.classes = unique([...state.classes.flatMap(partsOf), ...added]);
state.seen.push(...added);
const names = () => unique([...state.classes, ...Object.values({ ...DATA.given, ...state.labels }).flatMap(partsOf)]);
const served = document.documentElement.dataset.labels; // The file that takes the labels where the page is served.
let saved = { ...DATA.given }, problem = "", saving = false;

// Sends the labels that the file has not yet; one request at a time.
async function save() {
  const current = { ...DATA.given, ...state.labels }, changes = {};
  for (const name of Object.keys({ ...saved, ...current }))
    if (saved[name] !== current[name]) changes[name] = current[name] ?? "";
  if (!served || saving || !Object.keys(changes).length) return;
  saving = true;
  try {
    const answer = await fetch("labels", { method: "POST", body: JSON.stringify(changes) });
    problem = answer.ok ? "" : (await answer.json()).error ?? answer.statusText;
  } catch {
    problem = "the server does not answer: start it again by the same command, and open its new address";
  }
  saving = false;
  if (!problem) saved = current;
  draw();
}

// Follows the training that the button begins, and shows the new page once it is over.
async function follow(method) {
  const { runs, line, failed } = await (await fetch("training", { method })).json();
  $("train").disabled = runs;
  $("training").textContent = runs || failed ? line : "";
  if (runs) setTimeout(follow, 1000, "GET");
  else if (method === "GET" && !failed && $("training").dataset.begun) location.reload();
  $("training").dataset.begun = runs || "";
}

let chosen = null; // The figure of a prediction that keys label.

// {key: class}. A class of one character is its own key; others have digits, then letters without s and u.
function classes() {
  const byKey = new Map(), own = (name) => /^[0-9a-rtv-z]$/i.test(name);
  for (const name of names().filter(own)) if (!byKey.has(name.toLowerCase())) byKey.set(name.toLowerCase(), name);
  const free = [..."123456789abcdefghijklmnopqrtvwxyz"].filter((letter) => !byKey.has(letter));
  for (const name of names()) if (![...byKey.values()].includes(name) && free.length) byKey.set(free.shift(), name);
  return byKey;
}

// The label of an image in hand: where it has none, the prediction that its figure shows.
const current = (name, figure) => labelOf(name) ?? figure?.prediction ?? ";";

// Takes a class as the label; where an image may have several, adds it to those that it has, or takes it away.
function choose(name, label, figure) {
  if (!DATA.several) return setLabel(name, label);
  const before = partsOf(current(name, figure));
  const after = before.includes(label) ? before.filter((other) => other !== label) : [...before, label];
  setLabel(name, after.length || figure ? joined(after) : undefined, true); // Enter alone says none of them.
}

function setLabel(name, label, stays = false) {
  state.history.push([name, labelOf(name) ?? null, state.skipped.includes(name)]);
  state.skipped = state.skipped.filter((other) => other !== name);
  if (label === undefined) delete state.labels[name], delete DATA.given[name];
  else if (label !== null) state.labels[name] = label;
  else {
    state.skipped.push(name);
    if (name === state.hand) delete state.labels[name], delete DATA.given[name]; // The file may have it.
  }
  state.hand = stays && chosen?.dataset.name !== name ? name : null;
  if (chosen?.dataset.name === name && !stays) {
    const following = chosen.nextElementSibling;
    if (following) following.querySelector("button").focus();
  }
  draw();
}

function undo() {
  const [name, label, skipped] = state.history.pop() ?? [];
  if (!name) return;
  if (label === null) delete state.labels[name], delete DATA.given[name]; // The file has it since.
  else state.labels[name] = label;
  state.skipped = state.skipped.filter((other) => other !== name).concat(skipped ? [name] : []);
  state.hand = DATA.several && !skipped ? name : null;
  draw();
}

// One name that changed is a class renamed, with its labels; other changes add names, or take them away.
function setClasses(text) {
  const typed = unique(text.split(/[,;]/).map((name) => name.trim()));
  const before = state.classes.filter((name) => !typed.includes(name));
  const after = typed.filter((name) => !state.classes.includes(name));
  if (typed.length === state.classes.length && before.length === 1)
    for (const name of Object.keys({ ...DATA.given, ...state.labels })) {
      const parts = partsOf(labelOf(name));
      if (parts.includes(before[0])) state.labels[name] = joined(parts.map((part) => (part === before[0] ? after[0] : part)));
    }
  state.classes = typed;
  draw();
}

function inView(element) {
  const { top, bottom } = element.getBoundingClientRect(), middle = (top + bottom) / 2;
  return !element.hidden && middle > 0 && middle < innerHeight;
}

function csv() {
  const quoted = (text) => (/[",\n\r]|^\s|\s$/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const safe = (name) => (/^[\s=+\-@']/.test(name) ? "./" + name : name); // Spreadsheets would compute it.
  const others = Object.keys({ ...DATA.given, ...state.labels }).filter((name) => !DATA.suggested.some((image) => image.name === name));
  const images = [...DATA.suggested, ...others.map((name) => ({ name, split: "", index: "" }))];
  const rows = images.map(({ name, split, index }) =>
    [safe(name), labelOf(name) ?? "", split, index].map(String).map(quoted).join(","),
  );
  return ["\ufeffname,label,split,index", ...rows, ""].join("\n");
}

function buttons(image, figure) {
  const label = current(image, figure), disabled = !image;
  const made = [...classes()].map(([letter, name]) => {
    const ariaPressed = DATA.several ? String(partsOf(label).includes(name)) : null;
    return make("button", { textContent: `${letter}: ${name}`, ariaPressed, onclick: () => choose(image, name, figure), disabled });
  });
  if (!made.length) made.push(make("em", { textContent: "Type the names of the classes first." }));
  if (DATA.several) made.push(make("button", { textContent: `Enter: ${spoken(label)}`, onclick: () => setLabel(image, label), disabled }));
  made.push(make("button", { textContent: "s: skip", onclick: () => setLabel(image, null), disabled }));
  made.push(make("button", { textContent: "u: undo", onclick: undo, disabled: !state.history.length }));
  return made;
}

// A prediction: its picture, and the label that it was given here.
function prediction({ name, caption, prediction, truth }, picture) {
  const figure = make("figure", {}, picture, make("figcaption", {}));
  figure.style.width = "112px";
  if (DATA.correctable) figure.dataset.name = name;
  figure.draw = () => {
    const label = DATA.correctable ? labelOf(name) : undefined, known = label ?? truth;
    figure.classList.toggle("wrong", known !== undefined && joined(partsOf(known)) !== joined(partsOf(prediction)));
    figure.classList.toggle("chosen", figure === chosen);
    figure.lastChild.textContent = `${name}: ${caption}` + (label ? `; labelled ${spoken(label)}` : truth ? `; is ${spoken(truth)}` : "");
  };
  figure.prediction = prediction;
  return figure;
}

const MOST = 300; // Predictions of a class that are shown.
// The classes among which each label is shown: its own, or ";" for none.
const shownBy = DATA.classes.map((label) => (partsOf(label).length ? partsOf(label) : [label]));
function showPredictions(choice) {
  chosen = null;
  const { class: labels, prediction: predicted } = DATA.columns;
  const doubts = () => DATA.doubts.map((doubt) => {
    const image = make("img", { src: doubt.url, alt: doubt.name });
    return prediction(doubt, make("button", { className: "picture", onclick: (event) => event.currentTarget.focus() }, image));
  });
  const [number, truth] = choice.split(",").map(Number);
  const isShown = (row) => predicted[row] >= 0 && shownBy[predicted[row]].includes(DATA.classes[number]);
  const ofClass = () => [...predicted.keys()].filter((row) => isShown(row) && (truth === undefined || labels[row] === truth))
    .sort((one, other) => DATA.margins[one] - DATA.margins[other]).slice(0, MOST).map((row) => {
      const truth = labels && labels[row] >= 0 ? DATA.classes[labels[row]] : undefined;
      const label = DATA.classes[predicted[row]], margin = DATA.margins[row].toFixed(2);
      const about = { name: images.names[row], caption: DATA.several ? `${spoken(label)}, margin ${margin}` : `ahead by ${margin}`, prediction: label, truth };
      const picture = thumb(row, "", Math.max(1, Math.round(64 / sprite.size))).firstChild;
      picture.addEventListener("click", () => picture.focus()); // Some browsers leave the focus.
      return prediction(about, picture);
    });
  $("doubt-rows").replaceChildren(...(choice === "doubtful" ? doubts() : ofClass()));
  draw();
}

function draw() {
  try {
    localStorage.setItem(key, JSON.stringify(state));
  } catch {
    keeps = false;
  }
  const image = next(), given = Object.keys(DATA.given).length;
  $("large").hidden = !image;
  if (image) Object.assign($("large"), { src: image.url, alt: image.name });
  const labelled = DATA.suggested.filter(({ name }) => labelOf(name)).length;
  $("progress").textContent =
    `${labelled} of ${DATA.suggested.length} labelled` + (image ? `: ${image.name}` : ". Download them now.");
  const changed = Object.keys(state.labels).filter((name) => (DATA.given[name] ?? state.labels[name]) !== state.labels[name]);
  $("kept").textContent = [
    given ? `With the ${given} labels that there were.` : "",
    changed.length ? `${changed.length} of them were changed here, and these changes count.` : "",
    !served ? (keeps ? "What you do is kept in this browser." : "This browser keeps nothing: download before you close the page.")
      : problem ? `Not saved: ${problem}.` : `Saved in ${served}.`,
  ].join(" ");
  if (!problem) save();
  $("keys").replaceChildren(...buttons(image?.name));
  $("names").replaceChildren(...names().map((value) => make("option", { value })));
  $("correct").hidden = !chosen;
  if (chosen) $("correct").replaceChildren(make("span", { textContent: chosen.dataset.name }), ...buttons(chosen.dataset.name, chosen));
  for (const figure of $("doubt-rows").children) figure.draw();
  if ($("download").href) URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
}

if (DATA.doubts.length || DATA.margins.length) {
  const counts = new Map();
  for (const number of DATA.columns.prediction ?? [])
    for (const name of number < 0 ? [] : shownBy[number]) counts.set(name, (counts.get(name) ?? 0) + 1);
  const options = [...counts].map(([name, count]) => [DATA.classes.indexOf(name), count]).sort(([one], [other]) => one - other);
  $("by").replaceChildren(
    make("option", { value: "doubtful", textContent: "the most doubtful" }),
    ...options.map(([number, count]) => make("option", { value: number, textContent: `${spoken(DATA.classes[number])} (${count})` })),
  );
  $("choice").hidden = !options.length;
  $("by").onchange = (event) => showPredictions(event.target.value);
  showPredictions("doubtful");
}

// Labels by predictions, where both are one class; a click on a number shows its images.
const { class: truths, prediction: predictions } = DATA.columns;
if (truths && predictions && !DATA.several) {
  const cells = new Map(), rows = new Set(), columns = new Set();
  for (const [row, truth] of truths.entries()) {
    if (truth < 0 || predictions[row] < 0) continue;
    const cell = `${predictions[row]},${truth}`;
    cells.set(cell, (cells.get(cell) ?? 0) + 1);
    rows.add(truth);
    columns.add(predictions[row]).add(truth);
  }
  const ordered = [...columns].sort((one, other) => one - other), name = (number) => make("th", { textContent: DATA.classes[number] });
  const line = (truth) => ordered.map((number) => {
    const cell = `${number},${truth}`, count = cells.get(cell);
    const onclick = () => { $("by").value = ""; showPredictions(cell); $("doubt-rows").scrollIntoView({ block: "nearest" }); };
    const button = count ? [make("button", { textContent: count, ariaLabel: `${DATA.classes[truth]} as ${DATA.classes[number]}: ${count}`, onclick })] : [];
    return make("td", { className: count && number !== truth ? "wrong" : "" }, ...button);
  });
  const lines = ordered.filter((number) => rows.has(number)).map((truth) => make("tr", {}, name(truth), ...line(truth)));
  const recalls = [...rows].map((truth) => {
    const all = ordered.reduce((sum, number) => sum + (cells.get(`${number},${truth}`) ?? 0), 0);
    return (cells.get(`${truth},${truth}`) ?? 0) / all;
  });
  const balanced = recalls.reduce((sum, recall) => sum + recall, 0) / recalls.length;
  $("confusion").hidden = !lines.length;
  $("confusion").querySelector("summary").textContent = lines.length
    ? `Labels (rows) by predictions (columns), images that were learnt from among them; balanced accuracy ${balanced.toFixed(3)}` : "";
  $("confusion").querySelector("table").replaceChildren(make("tr", {}, make("th", {}), ...ordered.map(name)), ...lines);
}

if (served) {
  $("served").hidden = false;
  $("by-hand").hidden = true;
  $("train").onclick = () => follow("POST");
  follow("GET");
  fetch("labels").then((answer) => answer.json()).then((labels) => {
    if (labels.error) problem = labels.error;
    else [DATA.given, saved] = [labels, { ...labels }];
    draw();
  });
}

$("classes").value = state.classes.join(", ");
$("classes").onchange = (event) => setClasses(event.target.value);
$("classes").onkeydown = (event) => {
  if (event.key !== "Enter") return;
  event.target.blur();
  $("large").scrollIntoView({ block: "nearest" });
};
$("other").onkeydown = (event) => {
  const name = event.target.value.trim(), image = chosen?.dataset.name ?? next()?.name;
  if (event.key !== "Enter" || !name || !image) return;
  for (const part of partsOf(name)) if (!names().includes(part)) state.classes.push(part);
  $("classes").value = state.classes.join(", ");
  event.target.value = "";
  event.target.blur();
  for (const part of partsOf(name)) choose(image, part, chosen);
};
document.addEventListener("focusin", (event) => {
  const figure = event.target.closest("figure[data-name]");
  if (figure === chosen || event.target.closest("#correct, #other")) return;
  chosen = figure;
  draw();
});
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "u" || event.key === "Backspace") return undo();
  const shown = chosen ?? $("large"), image = chosen?.dataset.name ?? next()?.name;
  if (!image || !inView(shown)) return; // Nobody labels what is out of sight.
  const label = classes().get(event.key.toLowerCase());
  const control = event.target.closest("button, a, summary"), picture = chosen && control?.closest("figure") === chosen;
  if (label) choose(image, label, chosen);
  else if (event.key === "s") setLabel(image, null);
  else if (event.key === "/") $("other").focus();
  else if (event.key === "Enter" && DATA.several && (picture || !control)) setLabel(image, current(image, chosen));
  else if (event.key === "Enter" && picture) setLabel(image, chosen.prediction);
  else return;
  event.preventDefault();
});
draw();
