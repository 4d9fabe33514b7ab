"use strict";
// Shows a scene: its points, its cameras, and an eye that turns about a target.
// Axes are the scene's own (OpenCV's, of the first camera); a vector is an array of three numbers.

const element = (id) => document.getElementById(id);
const canvas = element("canvas");
const scene = JSON.parse(element("scene").textContent);
const COLORS = { cameras: [0.91, 0.45, 0.05], predicted: [0.18, 0.53, 0.92], hovered: [1, 0.1, 0.4] };
const RECORD = 10; // bytes of a point: three uint16, red, green, blue, rank
const SEGMENTS = 11; // lines of a camera
const FIELD = Math.tan((25 * Math.PI) / 180); // half the field of view, as a slope

// Vectors.

const add = (a, b, k = 1) => a.map((x, i) => x + k * b[i]);
const times = (a, k) => a.map((x) => x * k);
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [
  a[1] * b[2] - a[2] * b[1],
  a[2] * b[0] - a[0] * b[2],
  a[0] * b[1] - a[1] * b[0],
];
const unit = (a) => times(a, 1 / (Math.hypot(...a) || 1));

// Data.

/** Positions as floats, and colours with the rank of the confidence as alpha. */
function decode(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const data = new DataView(bytes.buffer);
  const count = bytes.length / RECORD;
  const positions = new Float32Array(3 * count);
  const colors = new Uint8Array(4 * count);
  for (let i = 0; i < count; i++) {
    const at = RECORD * i;
    const x = (data.getUint16(at, true) / 65535) * 4 - 2;
    const y = (data.getUint16(at + 2, true) / 65535) * 4 - 2;
    const z = (data.getUint16(at + 4, true) / 65535) * 4 - 2;
    // The shell between the balls of radius 1 and 2 holds all the space beyond.
    const length = Math.sqrt(x * x + y * y + z * z);
    const scale = length > 1 ? 1 / (length * Math.max(2 - length, 1e-4)) : 1;
    positions[3 * i] = x * scale;
    positions[3 * i + 1] = y * scale;
    positions[3 * i + 2] = z * scale;
    for (let k = 0; k < 4; k++) colors[4 * i + k] = bytes[at + 6 + k];
  }
  return { count, positions, colors };
}

/** How many points are of at least each rank. */
function countByRank({ count, colors }) {
  const least = new Array(257).fill(0);
  for (let i = 0; i < count; i++) least[colors[4 * i + 3]]++;
  for (let rank = 254; rank >= 0; rank--) least[rank] += least[rank + 1];
  return least;
}

/** The lines of frusta of depth `size`, 22 vertices each; the last goes to where it is refined. */
function frusta(cameras, size) {
  const vertices = [];
  cameras.forEach(([center, ...rays], i) => {
    const [a, b, c, d] = rays.map((ray) => add(center, ray, size));
    const top = add(times(add(a, b), 0.5), add(a, d, -1), 0.25); // a roof shows which way is up
    const refined = scene.cameras[i][0];
    const lines = [center, a, center, b, center, c, center, d, a, b, b, c, c, d, d, a, a, top, top, b];
    vertices.push(...lines, center, refined);
  });
  return new Float32Array(vertices.flat());
}

const axisOf = ([, ...rays]) => unit(rays.reduce((sum, ray) => add(sum, ray)));

// The eye.

const UP = scene.up;
const EAST = unit(cross(Math.abs(UP[0]) < 0.9 ? [1, 0, 0] : [0, 0, 1], UP));
const NORTH = cross(UP, EAST);
const eye = { target: [0, 0, 0], yaw: 0, pitch: 0, distance: 1, field: FIELD };

/** Puts the eye at `place`, looking at `target`. */
function put(place, target, field = FIELD) {
  const back = add(place, target, -1);
  const pitch = Math.asin(Math.max(-1, Math.min(1, dot(unit(back), UP))));
  const yaw = Math.atan2(dot(back, EAST), dot(back, NORTH));
  Object.assign(eye, { target, yaw, pitch, distance: Math.hypot(...back), field });
  draw();
}

/** Right, up and backward of the eye, and its place. */
function frame() {
  const level = add(times(EAST, Math.sin(eye.yaw)), times(NORTH, Math.cos(eye.yaw)));
  const back = add(times(level, Math.cos(eye.pitch)), times(UP, Math.sin(eye.pitch)));
  const right = cross(UP, level);
  return { right, up: cross(back, right), back, place: add(eye.target, back, eye.distance) };
}

/** The matrix from the world into clip space, column by column; nothing is too far away. */
function clipFromWorld() {
  const { right, up, back, place } = frame();
  const aspect = canvas.width / canvas.height;
  const near = eye.distance / 200;
  const row = (axis, scale) => [...times(axis, scale), -scale * dot(axis, place)];
  const x = row(right, 1 / (eye.field * aspect));
  const y = row(up, 1 / eye.field);
  const depth = row(back, -1);
  return [0, 1, 2, 3].flatMap((i) => [x[i], y[i], depth[i] - (i === 3 ? 2 * near : 0), depth[i]]);
}

/** Where a point is on the screen, in CSS pixels from the top left, and its depth. */
function onScreen(m, x, y, z) {
  const w = m[3] * x + m[7] * y + m[11] * z + m[15];
  const across = (m[0] * x + m[4] * y + m[8] * z + m[12]) / w;
  const down = (m[1] * x + m[5] * y + m[9] * z + m[13]) / w;
  return [((across + 1) / 2) * canvas.clientWidth, ((1 - down) / 2) * canvas.clientHeight, w];
}

// Drawing.

const POINT_SHADER = `#version 300 es
uniform mat4 clip_from_world;
uniform float size, most, least;
in vec3 position;
in vec4 color;
out vec3 shade;
void main() {
  gl_Position = color.a < least ? vec4(2, 2, 2, 1) : clip_from_world * vec4(position, 1);
  gl_PointSize = clamp(size / gl_Position.w, 1.0, most);
  shade = color.rgb;
}`;
const LINE_SHADER = `#version 300 es
uniform mat4 clip_from_world;
uniform vec3 color;
in vec3 position;
out vec3 shade;
void main() {
  gl_Position = clip_from_world * vec4(position, 1);
  shade = color;
}`;
const COLOR_SHADER = `#version 300 es
precision mediump float;
in vec3 shade;
out vec4 color;
void main() { color = vec4(shade, 1); }`;

const gl = canvas.getContext("webgl2", { antialias: true });
let cloud, ranks, points, lines;
const layers = {};
let hovered = null; // [kind, index] of a camera
let waiting = false;

/** A program, with the places of its uniforms and attributes by name. */
function program(vertex) {
  const made = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, COLOR_SHADER]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw Error(gl.getProgramInfoLog(made));
  return { made, at: (name) => gl.getUniformLocation(made, name) };
}

/** Buffers, each [attribute's name, values, numbers a vertex], as one thing to draw. */
function layer({ made }, ...buffers) {
  const array = gl.createVertexArray();
  gl.bindVertexArray(array);
  for (const [name, values, width] of buffers) {
    const place = gl.getAttribLocation(made, name);
    const bytes = values instanceof Uint8Array;
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, width, bytes ? gl.UNSIGNED_BYTE : gl.FLOAT, bytes, 0, 0);
  }
  return array;
}

const shown = (kind) => scene[kind] && element(kind).checked;
const frustumSize = () => scene.size * 2 ** element("size").valueAsNumber;
const leastRank = () => Math.ceil(element("confidence").valueAsNumber * 2.55);

/** Draws before the screen is next renewed, once however often it is asked to. */
function draw() {
  if (!waiting) requestAnimationFrame(paint);
  waiting = true;
}

function paint() {
  waiting = false;
  const matrix = clipFromWorld();
  gl.viewport(0, 0, canvas.width, canvas.height);
  gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
  gl.useProgram(points.made);
  gl.uniformMatrix4fv(points.at("clip_from_world"), false, matrix);
  // As many pixels as the slider says at the distance that the target had at the start.
  const size = element("points").valueAsNumber * devicePixelRatio;
  gl.uniform1f(points.at("size"), size * Math.hypot(...add(scene.eye, scene.target, -1)));
  gl.uniform1f(points.at("most"), 2.5 * size);
  gl.uniform1f(points.at("least"), (leastRank() - 0.5) / 255);
  gl.bindVertexArray(layers.cloud);
  gl.drawArrays(gl.POINTS, 0, cloud.count);
  gl.useProgram(lines.made);
  gl.uniformMatrix4fv(lines.at("clip_from_world"), false, matrix);
  for (const kind of ["predicted", "cameras"]) {
    if (!shown(kind)) continue;
    gl.uniform3fv(lines.at("color"), COLORS[kind]);
    gl.bindVertexArray(layers[kind]);
    gl.drawArrays(gl.LINES, 0, 2 * SEGMENTS * scene[kind].length);
  }
  if (hovered && shown(hovered[0])) {
    gl.disable(gl.DEPTH_TEST); // through the points
    gl.uniform3fv(lines.at("color"), COLORS.hovered);
    gl.bindVertexArray(layers[hovered[0]]);
    gl.drawArrays(gl.LINES, 2 * SEGMENTS * hovered[1], 2 * SEGMENTS);
    gl.enable(gl.DEPTH_TEST);
  }
  document.body.dataset.drawn = "yes";
}

function layCameras() {
  for (const kind of ["cameras", "predicted"]) {
    if (scene[kind]) layers[kind] = layer(lines, ["position", frusta(scene[kind], frustumSize()), 3]);
  }
  draw();
}

function fit() {
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  draw();
}

function say() {
  const number = (n) => n.toLocaleString("en");
  const visible = ranks[leastRank()];
  const all = scene.points;
  const some = visible === all ? number(all) : `${number(visible)} of ${number(all)}`;
  const photos = scene.names.length === 1 ? "1 photo" : `${number(scene.names.length)} photos`;
  element("count").textContent = `${photos}, ${some} points`;
  element("percent").textContent = `${element("confidence").value} %`;
  draw();
}

// What the user does.

/** The camera within 16 pixels of a place on the screen, as [kind, index], or null. */
function cameraAt(x, y) {
  const matrix = clipFromWorld();
  let best = null;
  let least = 16;
  for (const kind of ["cameras", "predicted"].filter(shown)) {
    scene[kind].forEach((camera, i) => {
      for (const place of [camera[0], add(camera[0], axisOf(camera), frustumSize())]) {
        const [across, down, depth] = onScreen(matrix, ...place);
        const distance = Math.hypot(across - x, down - y);
        if (depth > 0 && distance < least) [best, least] = [[kind, i], distance];
      }
    });
  }
  return best;
}

/** The nearest visible point within 8 pixels of a place on the screen, or null. */
function pointAt(x, y) {
  const m = clipFromWorld();
  const { clientWidth, clientHeight } = canvas;
  const [across, down] = [(2 * x) / clientWidth - 1, 1 - (2 * y) / clientHeight];
  const rank = leastRank();
  let best = null;
  let least = Infinity;
  for (let i = 0; i < cloud.count; i++) {
    const a = cloud.positions[3 * i];
    const b = cloud.positions[3 * i + 1];
    const c = cloud.positions[3 * i + 2];
    const w = m[3] * a + m[7] * b + m[11] * c + m[15];
    const isNear =
      Math.abs(m[0] * a + m[4] * b + m[8] * c + m[12] - across * w) < (16 / clientWidth) * w &&
      Math.abs(m[1] * a + m[5] * b + m[9] * c + m[13] - down * w) < (16 / clientHeight) * w;
    if (w < least && isNear && cloud.colors[4 * i + 3] >= rank) [best, least] = [[a, b, c], w];
  }
  return best;
}

/** Looks where a photo looked, from where it was taken, with room around it. */
function lookFrom(kind, index) {
  const camera = scene[kind][index];
  const [center, ...rays] = camera;
  const axis = axisOf(camera);
  const depth = dot(add(scene.target, center, -1), axis);
  const { clientWidth, clientHeight } = canvas;
  const across = Math.hypot(...add(rays[1], rays[0], -1)) / 2;
  const down = Math.hypot(...add(rays[3], rays[0], -1)) / 2;
  const field = 1.15 * Math.max(down, (across * clientHeight) / clientWidth);
  put(center, add(center, axis, depth > 0.05 ? depth : 1), field);
  element("photo").value = index;
}

function reset() {
  put(scene.eye, scene.target);
  element("photo").value = "";
}

function hover(x, y) {
  const found = cameraAt(x, y);
  const label = element("label");
  label.hidden = !found;
  canvas.style.cursor = found ? "pointer" : "grab";
  if (found) {
    label.textContent = scene.names[found[1]] + (found[0] === "predicted" ? " (predicted)" : "");
    label.style.left = `${Math.min(x + 14, innerWidth - label.offsetWidth - 8)}px`;
    label.style.top = `${Math.max(8, y - 30)}px`;
  }
  if (String(found) !== String(hovered)) draw();
  hovered = found;
}

function turn(across, down) {
  eye.yaw += across * 0.006;
  eye.pitch = Math.max(-1.55, Math.min(1.55, eye.pitch + down * 0.006));
  draw();
}

function move(across, down) {
  const { right, up } = frame();
  const scale = (2 * eye.field * eye.distance) / canvas.clientHeight;
  eye.target = add(add(eye.target, right, -across * scale), up, down * scale);
  draw();
}

function approach(factor) {
  eye.distance = Math.max(1e-4, Math.min(1e4, eye.distance * factor));
  draw();
}

function listenToPointers() {
  const down = new Map(); // pointers that are pressed: mouse button, pen, fingers
  let travelled = 0;
  canvas.onpointerdown = (event) => {
    if (!down.size) travelled = 0;
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, [event.clientX, event.clientY]);
  };
  canvas.onpointermove = (event) => {
    const before = down.get(event.pointerId);
    if (!before) return hover(event.clientX, event.clientY);
    const [x, y] = [event.clientX - before[0], event.clientY - before[1]];
    travelled += Math.hypot(x, y);
    const other = [...down].find(([id]) => id !== event.pointerId)?.[1];
    down.set(event.pointerId, [event.clientX, event.clientY]);
    if (other) {
      const apart = ([a, b]) => Math.hypot(a - other[0], b - other[1]) + 1;
      approach(apart(before) / apart([event.clientX, event.clientY]));
      move(x / 2, y / 2);
    } else if (event.buttons > 1 || event.shiftKey) move(x, y);
    else turn(x, y);
  };
  canvas.onpointerup = canvas.onpointercancel = (event) => {
    down.delete(event.pointerId);
    if (travelled > 4 || event.type === "pointercancel") return;
    hover(event.clientX, event.clientY); // a finger does not hover first
    if (hovered) lookFrom(...hovered);
  };
  canvas.onpointerleave = () => hover(-99, -99);
  canvas.oncontextmenu = (event) => event.preventDefault();
  canvas.ondblclick = (event) => {
    const found = pointAt(event.clientX, event.clientY);
    if (found) put(frame().place, found, eye.field);
  };
  const wheel = (event) => {
    event.preventDefault();
    approach(Math.exp(event.deltaY * (event.deltaMode ? 0.03 : 0.001)));
  };
  canvas.addEventListener("wheel", wheel, { passive: false });
}

function listenToKeys() {
  const acts = {
    ArrowLeft: () => turn(-20, 0),
    ArrowRight: () => turn(20, 0),
    ArrowUp: () => turn(0, -20),
    ArrowDown: () => turn(0, 20),
    "+": () => approach(0.9),
    "-": () => approach(1 / 0.9),
  };
  canvas.onkeydown = (event) => acts[event.key]?.();
}

function listenToPanel() {
  element("confidence").oninput = say;
  element("points").oninput = element("cameras").oninput = element("predicted").oninput = draw;
  element("size").oninput = layCameras;
  element("photo").oninput = ({ target }) => (target.value ? lookFrom("cameras", target.value) : reset());
  element("reset").onclick = reset;
  element("theme").onclick = () => {
    const style = document.documentElement.style;
    const light = style.colorScheme || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");
    style.colorScheme = light === "light" ? "dark" : "light";
  };
}

function fillPanel() {
  element("made").textContent = `page by ${scene.tool}`;
  element("sure").hidden = !scene.sure;
  element("before").hidden = !scene.predicted;
  if (scene.predicted) element("kind").textContent = "refined cameras";
  element("photo").append(...scene.names.map((name, i) => new Option(name, i)));
}

function start() {
  if (!gl) {
    element("message").hidden = false;
    element("message").textContent = "This browser or graphics driver has no WebGL 2.";
    return;
  }
  cloud = decode(element("cloud").textContent);
  ranks = countByRank(cloud);
  points = program(POINT_SHADER);
  lines = program(LINE_SHADER);
  layers.cloud = layer(points, ["position", cloud.positions, 3], ["color", cloud.colors, 4]);
  gl.enable(gl.DEPTH_TEST);
  fillPanel();
  // Large enough to close surfaces that fill about a third of the screen, where there are enough.
  const spacing = Math.sqrt((canvas.clientWidth * canvas.clientHeight) / cloud.count);
  element("points").value = Math.min(3, 1.2 * spacing);
  listenToPointers();
  listenToKeys();
  listenToPanel();
  layCameras();
  reset();
  addEventListener("resize", fit);
  fit();
  say();
}

start();
