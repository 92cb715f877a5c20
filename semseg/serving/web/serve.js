"use strict";

const MAX_EDGE = 1600; // pixels of the overlay: screens do not show more
const FAINT_OPACITY = 0x28; // of the other classes while one is highlighted
const BORDER_BRIGHTNESS = 0.35; // of the line between two classes, as a fraction of the class colour's

const byId = (id) => document.getElementById(id);
const context = byId("overlay").getContext("2d");
let network = null; // the response of GET /network
let result = null; // of the image on the page: {ids, width, height, classes, overlay: {ids, width, height}}
let highlightedId = null; // id of the highlighted class
let currentRequest = new AbortController();

start();

async function start() {
  byId("command").textContent = `curl -F image=@photo.jpg ${location.origin}/predict`;
  network = await (await fetch("/network")).json();
  document.title = `${network.name} · semseg`;
  byId("network").textContent = `${network.name}, ${network.classes.length} classes`;
  const megabytes = (network.max_upload_bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 });
  const megapixels = (network.max_pixels / 1e6).toLocaleString("en", { maximumFractionDigits: 1 });
  const bands = String(network.bands) === "red,green,blue" ? "" : `with the bands ${network.bands.join(", ")}, `;
  byId("limits").textContent = `${bands}up to ${megabytes} MB and ${megapixels} megapixels, sent only to this server`;
}

// ---- choose an image

byId("file").addEventListener("change", () => {
  const [file] = byId("file").files;
  if (file) predict(file);
  byId("file").value = ""; // so that the same file can be chosen again
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
  currentRequest.abort();
  const request = (currentRequest = new AbortController());
  if (network && file.size > network.max_upload_bytes) {
    showStatus("wrong", `${file.name}: larger than the limit of ${network.max_upload_bytes / 2 ** 20} MB.`);
    return;
  }
  showStatus("busy", `Predicting ${file.name} …`);
  const start = performance.now();
  const form = new FormData();
  form.append("image", file);
  try {
    const response = await fetch("/predict", { method: "POST", body: form, signal: request.signal });
    const content = await response.json();
    if (!response.ok) throw new Error(content.detail);
    const png = decodeBase64(content.mask);
    const mask = await readMask(png);
    if (request.signal.aborted) return;
    const shown = content.picture ? new Blob([decodeBase64(content.picture)], { type: "image/jpeg" }) : file;
    showResult(file.name, shown, png, { ...mask, classes: content.classes });
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    showStatus("done", `${file.name}: ${mask.width} × ${mask.height} pixels, ${seconds} s`);
  } catch (error) {
    if (request.signal.aborted) return;
    const isOffline = error instanceof TypeError; // fetch throws it if there is no response
    showStatus("wrong", isOffline ? "The server does not respond. Check that it is running." : error.message);
  }
}

function decodeBase64(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

function showStatus(kind, text) {
  byId("status").className = kind;
  byId("status").textContent = text;
}

// ---- decode the mask

// Reads the exact values of a grey PNG of 8 or 16 bits. A canvas would round them to 8 bits, and browsers may add
// noise to it against fingerprinting.
async function readMask(png) {
  const view = new DataView(png.buffer);
  const [width, height, bytes] = [view.getUint32(16), view.getUint32(20), png[24] / 8];
  const parts = [];
  for (let offset = 8; offset < png.length; offset += 12 + view.getUint32(offset)) {
    const isData = view.getUint32(offset + 4) === 0x49444154; // IDAT
    if (isData) parts.push(png.subarray(offset + 8, offset + 8 + view.getUint32(offset)));
  }
  const stream = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = undoFilters(new Uint8Array(await new Response(stream).arrayBuffer()), width * bytes, height, bytes);
  const ids = new Uint16Array(width * height);
  for (let i = 0; i < ids.length; i++) ids[i] = bytes === 1 ? rows[i] : (rows[2 * i] << 8) | rows[2 * i + 1];
  return { ids, width, height };
}

// Undoes the filters of a PNG (section 9 of its specification): each row begins with the number of its filter.
function undoFilters(data, rowLength, height, step) {
  const rows = new Uint8Array(rowLength * height);
  const predictors = [
    () => 0,
    (left) => left,
    (left, up) => up,
    (left, up) => (left + up) >> 1,
    paeth,
  ];
  for (let y = 0; y < height; y++) {
    const predictor = predictors[data[y * (rowLength + 1)]];
    const source = y * (rowLength + 1) + 1;
    const target = y * rowLength;
    for (let x = 0; x < rowLength; x++) {
      const left = x >= step ? rows[target + x - step] : 0;
      const up = y ? rows[target + x - rowLength] : 0;
      const corner = y && x >= step ? rows[target + x - step - rowLength] : 0;
      rows[target + x] = data[source + x] + predictor(left, up, corner);
    }
  }
  return rows;
}

function paeth(left, up, corner) {
  const estimate = left + up - corner;
  const [toLeft, toUp, toCorner] = [left, up, corner].map((value) => Math.abs(estimate - value));
  if (toLeft <= toUp && toLeft <= toCorner) return left;
  return toUp <= toCorner ? up : corner;
}

// ---- show the result

// Shows a prediction over `image`, a file or a blob that the browser can draw.
function showResult(name, image, png, prediction) {
  result = { ...prediction, overlay: shrinkMask(prediction) };
  highlightedId = null;
  setBlobUrl(byId("image"), "src", image);
  setBlobUrl(byId("download"), "href", new Blob([png], { type: "image/png" }));
  byId("download").download = `${name.replace(/\.[^.]*$/, "")}_ids.png`;
  byId("view").style.setProperty("--ratio", result.width / result.height);
  byId("view").classList.toggle("small", Math.max(result.width, result.height) < 400);
  byId("legend").tBodies[0].replaceChildren(...result.classes.map(createLegendRow));
  byId("legend").querySelectorAll("th").forEach((header) => header.removeAttribute("aria-sort"));
  byId("tip").hidden = true;
  byId("result").hidden = false;
  drawOverlay();
}

// Sets an attribute to the URL of new content, and releases the old content.
function setBlobUrl(element, attribute, blob) {
  URL.revokeObjectURL(element[attribute]);
  element[attribute] = URL.createObjectURL(blob);
}

function createLegendRow(entry) {
  const row = document.createElement("tr");
  row.dataset.id = entry.id;
  const name = document.createElement("th");
  name.scope = "row";
  name.dataset.value = entry.name;
  const swatch = document.createElement("span");
  swatch.className = "swatch";
  swatch.style.setProperty("--colour", entry.colour);
  name.append(swatch, entry.name);
  const share = document.createElement("td");
  share.className = "score";
  share.dataset.value = entry.share;
  const bar = document.createElement("span");
  const percent = (100 * entry.share).toFixed(1);
  bar.style.setProperty("--share", `${percent}%`);
  const number = document.createElement("b");
  number.textContent = entry.share >= 0.0005 ? percent : "<0.1";
  bar.append(number);
  share.append(bar);
  row.append(name, share);
  row.addEventListener("pointerenter", () => highlight(entry.id));
  row.addEventListener("pointerleave", () => highlight(null));
  return row;
}

// Shrinks the mask to the resolution of the overlay.
function shrinkMask({ ids, width, height }) {
  const scale = Math.min(1, MAX_EDGE / Math.max(width, height));
  const [columns, rows] = [width, height].map((length) => Math.max(1, Math.round(length * scale)));
  const small = new Uint16Array(columns * rows);
  for (let y = 0, target = 0; y < rows; y++) {
    const row = Math.floor(((y + 0.5) * height) / rows) * width;
    for (let x = 0; x < columns; x++) small[target++] = ids[row + Math.floor(((x + 0.5) * width) / columns)];
  }
  return { ids: small, width: columns, height: rows };
}

// Draws the classes in their colours, with dark borders between them; a highlighted class makes the others faint.
function drawOverlay() {
  const { ids, width, height } = result.overlay;
  const pixels = new ImageData(width, height);
  const colours = new Map(result.classes.map((entry) => [entry.id, parseInt(entry.colour.slice(1), 16)]));
  for (let i = 0, target = 0; i < ids.length; i++, target += 4) {
    const id = ids[i];
    const isBorder = (ids[i + 1] !== id && (i + 1) % width) || (i + width < ids.length && ids[i + width] !== id);
    const brightness = isBorder ? BORDER_BRIGHTNESS : 1;
    const colour = colours.get(id);
    pixels.data[target] = (colour >> 16) * brightness;
    pixels.data[target + 1] = ((colour >> 8) & 255) * brightness;
    pixels.data[target + 2] = (colour & 255) * brightness;
    const opacity = highlightedId === null || highlightedId === id ? 255 : FAINT_OPACITY;
    pixels.data[target + 3] = colour === undefined ? 0 : opacity; // pixels without values have no class
  }
  byId("overlay").width = width;
  byId("overlay").height = height;
  context.putImageData(pixels, 0, 0);
}

// ---- highlight a class

function highlight(id) {
  if (!result || id === highlightedId) return;
  highlightedId = id;
  for (const row of byId("legend").tBodies[0].rows) row.classList.toggle("highlighted", row.dataset.id === String(id));
  drawOverlay();
}

byId("view").addEventListener("pointermove", showClassName);
byId("view").addEventListener("pointerdown", showClassName);
byId("view").addEventListener("pointerleave", () => {
  byId("tip").hidden = true;
  highlight(null);
});

function showClassName(event) {
  const box = byId("view").getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  const toIndex = (fraction, length) => Math.min(length - 1, Math.max(0, Math.floor(fraction * length)));
  const row = toIndex(y / box.height, result.height);
  const id = result.ids[row * result.width + toIndex(x / box.width, result.width)];
  const tip = byId("tip");
  tip.textContent = result.classes.find((entry) => entry.id === id)?.name ?? "no class";
  tip.hidden = false;
  tip.classList.toggle("below", y < 48);
  const half = tip.offsetWidth / 2;
  tip.style.left = `${Math.min(box.width - half, Math.max(half, x))}px`;
  tip.style.top = `${y}px`;
  highlight(id);
}

byId("opacity").addEventListener("input", () => {
  byId("overlay").style.opacity = byId("opacity").value / 100;
});
