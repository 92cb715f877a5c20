"use strict";

const MAX_EDGE = 1600; // pixels of the overlay: no screen shows more of it
const FAINT = 0x28; // opacity of the other classes while one is pointed at
const BORDER = 0.35; // brightness of the line between two classes, as a share of the colour's

const at = (id) => document.getElementById(id);
const context = at("overlay").getContext("2d");
let network = null; // what GET /network says
let shown = null; // of the image on the page: {ids, width, height, classes, drawn: {ids, width, height}}
let under = null; // id of the class that is pointed at
let running = new AbortController(); // the request under way

start();

async function start() {
  at("command").textContent = `curl -F image=@photo.jpg ${location.origin}/predict`;
  network = await (await fetch("/network")).json();
  document.title = `${network.name} · semseg`;
  at("network").textContent = `${network.name}, ${network.classes.length} classes`;
  const megabytes = (network.max_upload_bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 });
  const megapixels = (network.max_pixels / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
  at("limits").textContent = `up to ${megabytes} MB and ${megapixels} megapixels, sent to this server only`;
}

// ---- choosing an image

at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) predict(file);
  at("file").value = ""; // so that the same file can be chosen again
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) predict(file);
});
addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) predict(file);
});

async function predict(file) {
  running.abort();
  const mine = (running = new AbortController());
  if (network && file.size > network.max_upload_bytes) {
    say("wrong", `${file.name}: larger than the ${network.max_upload_bytes / 2 ** 20} MB that are taken here.`);
    return;
  }
  say("busy", `Looking at ${file.name} …`);
  const began = performance.now();
  const form = new FormData();
  form.append("image", file);
  try {
    const response = await fetch("/predict", { method: "POST", body: form, signal: mine.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.detail);
    const png = Uint8Array.from(atob(answer.mask), (letter) => letter.charCodeAt(0));
    const mask = await readMask(png);
    if (mine.signal.aborted) return;
    show(file, png, { ...mask, classes: answer.classes });
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say("done", `${file.name}: ${mask.width} × ${mask.height} pixels, ${seconds} s`);
  } catch (error) {
    if (mine.signal.aborted) return;
    const isOffline = error instanceof TypeError; // what fetch throws when nobody answers
    say("wrong", isOffline ? "The server does not answer. Does it still run?" : error.message);
  }
}

function say(kind, text) {
  at("status").className = kind;
  at("status").textContent = text;
}

// ---- the mask

// The numbers of a grey PNG of 8 or 16 bits, as they are: a canvas would round them to 8 bits, and may blur them on
// purpose against fingerprinting.
async function readMask(png) {
  const view = new DataView(png.buffer);
  const [width, height, bytes] = [view.getUint32(16), view.getUint32(20), png[24] / 8];
  const parts = [];
  for (let place = 8; place < png.length; place += 12 + view.getUint32(place)) {
    const isData = view.getUint32(place + 4) === 0x49444154; // IDAT
    if (isData) parts.push(png.subarray(place + 8, place + 8 + view.getUint32(place)));
  }
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = unfiltered(new Uint8Array(await new Response(stream).arrayBuffer()), width * bytes, height, bytes);
  const ids = new Uint16Array(width * height);
  for (let i = 0; i < ids.length; i++) ids[i] = bytes === 1 ? rows[i] : (rows[2 * i] << 8) | rows[2 * i + 1];
  return { ids, width, height };
}

// Undo the filters of a PNG (its specification, section 9): each row begins with the number of its filter.
function unfiltered(data, rowLength, height, step) {
  const rows = new Uint8Array(rowLength * height);
  const guesses = [
    () => 0,
    (left) => left,
    (left, up) => up,
    (left, up) => (left + up) >> 1,
    paeth,
  ];
  for (let y = 0; y < height; y++) {
    const guess = guesses[data[y * (rowLength + 1)]];
    const source = y * (rowLength + 1) + 1;
    const target = y * rowLength;
    for (let x = 0; x < rowLength; x++) {
      const left = x >= step ? rows[target + x - step] : 0;
      const up = y ? rows[target + x - rowLength] : 0;
      const corner = y && x >= step ? rows[target + x - step - rowLength] : 0;
      rows[target + x] = data[source + x] + guess(left, up, corner);
    }
  }
  return rows;
}

function paeth(left, up, corner) {
  const guess = left + up - corner;
  const [toLeft, toUp, toCorner] = [Math.abs(guess - left), Math.abs(guess - up), Math.abs(guess - corner)];
  if (toLeft <= toUp && toLeft <= toCorner) return left;
  return toUp <= toCorner ? up : corner;
}

// ---- the result

function show(file, png, result) {
  shown = { ...result, drawn: thinned(result) };
  under = null;
  renew(at("image"), "src", file);
  renew(at("download"), "href", new Blob([png], { type: "image/png" }));
  at("download").download = `${file.name.replace(/\.[^.]*$/, "")}_ids.png`;
  at("view").style.setProperty("--ratio", shown.width / shown.height);
  at("view").classList.toggle("small", Math.max(shown.width, shown.height) < 400);
  at("legend").tBodies[0].replaceChildren(...shown.classes.map(legendRow));
  at("legend").querySelectorAll("th").forEach((head) => head.removeAttribute("aria-sort"));
  at("tip").hidden = true;
  at("result").hidden = false;
  draw();
}

// Point an attribute at new content, and let go of the old.
function renew(element, attribute, blob) {
  URL.revokeObjectURL(element[attribute]);
  element[attribute] = URL.createObjectURL(blob);
}

function legendRow(one) {
  const row = document.createElement("tr");
  row.dataset.id = one.id;
  const name = document.createElement("th");
  name.scope = "row";
  name.dataset.value = one.name;
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.setProperty("--colour", one.colour);
  name.append(swatch, one.name);
  const share = document.createElement("td");
  share.className = "score";
  share.dataset.value = one.share;
  const bar = document.createElement("span");
  const percent = (100 * one.share).toFixed(1);
  bar.style.setProperty("--share", `${percent}%`);
  bar.textContent = one.share >= 0.0005 ? percent : "<0.1";
  share.append(bar);
  row.append(name, share);
  row.addEventListener("pointerenter", () => pointAt(one.id));
  row.addEventListener("pointerleave", () => pointAt(null));
  return row;
}

// The mask on the grid that is drawn: no finer than a screen shows.
function thinned({ ids, width, height }) {
  const scale = Math.min(1, MAX_EDGE / Math.max(width, height));
  const [columns, rows] = [width, height].map((length) => Math.max(1, Math.round(length * scale)));
  const thin = new Uint16Array(columns * rows);
  for (let y = 0, place = 0; y < rows; y++) {
    const row = Math.floor(((y + 0.5) * height) / rows) * width;
    for (let x = 0; x < columns; x++) thin[place++] = ids[row + Math.floor(((x + 0.5) * width) / columns)];
  }
  return { ids: thin, width: columns, height: rows };
}

// The classes in colours, the borders between them dark; all but the class that is pointed at are faint.
function draw() {
  const { ids, width, height } = shown.drawn;
  const pixels = new ImageData(width, height);
  const colours = new Map(shown.classes.map((one) => [one.id, parseInt(one.colour.slice(1), 16)]));
  for (let i = 0, place = 0; i < ids.length; i++, place += 4) {
    const id = ids[i];
    const isBorder = (ids[i + 1] !== id && (i + 1) % width) || (i + width < ids.length && ids[i + width] !== id);
    const light = isBorder ? BORDER : 1;
    const colour = colours.get(id);
    pixels.data[place] = (colour >> 16) * light;
    pixels.data[place + 1] = ((colour >> 8) & 255) * light;
    pixels.data[place + 2] = (colour & 255) * light;
    pixels.data[place + 3] = under === null || under === id ? 255 : FAINT;
  }
  at("overlay").width = width;
  at("overlay").height = height;
  context.putImageData(pixels, 0, 0);
}

// ---- pointing

function pointAt(id) {
  if (!shown || id === under) return;
  under = id;
  for (const row of at("legend").tBodies[0].rows) row.classList.toggle("highlighted", row.dataset.id === String(id));
  draw();
}

at("view").addEventListener("pointermove", nameClass);
at("view").addEventListener("pointerdown", nameClass);
at("view").addEventListener("pointerleave", () => {
  at("tip").hidden = true;
  pointAt(null);
});

function nameClass(event) {
  const box = at("view").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const inside = (share, length) => Math.min(length - 1, Math.max(0, Math.floor(share * length)));
  const row = inside(y / box.height, shown.height);
  const id = shown.ids[row * shown.width + inside(x / box.width, shown.width)];
  const tip = at("tip");
  tip.textContent = shown.classes.find((one) => one.id === id).name;
  tip.hidden = false;
  tip.classList.toggle("below", y < 48);
  const half = tip.offsetWidth / 2;
  tip.style.left = `${Math.min(box.width - half, Math.max(half, x))}px`;
  tip.style.top = `${y}px`;
  pointAt(id);
}

at("opacity").addEventListener("input", () => {
  at("overlay").style.opacity = at("opacity").value / 100;
});
