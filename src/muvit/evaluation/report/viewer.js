"use strict";
// Slides to move and zoom. Positions are in pixels of the finest level; tiles of labels are class numbers in grey, which
// an SVG filter paints, so that no pixel has to be read (browsers forbid that for files).
document.querySelectorAll(".viewer").forEach((root, number) => {
  root.hidden = false;
  const slide = JSON.parse(root.querySelector("script").textContent);
  const stage = root.querySelector(".stage"), bar = root.querySelector(".scale"), [width, height] = slide.size;
  const range = root.querySelector("input[type=range]"), checks = [...root.querySelectorAll("input[type=checkbox]")];
  const layers = slide.layers.map((layer) => ({...layer, tiles: new Map(), canvas: document.createElement("canvas")}));
  const labels = layers[layers.length - 1].canvas;
  stage.prepend(...layers.map((layer) => layer.canvas));
  stage.insertAdjacentHTML("beforeend", `<svg style="position:absolute;width:0;height:0" aria-hidden="true">
    <filter id="paint-${number}" x="0" y="0" width="100%" height="100%" color-interpolation-filters="sRGB">
    <feComponentTransfer in="SourceGraphic" result="color">${["R", "G", "B"].map((channel, i) =>
      `<feFunc${channel} type="discrete" tableValues="${slide.colors.map((c) => c[i] / 255).join(" ")}"/>`).join("")}
    </feComponentTransfer>
    <feColorMatrix in="SourceGraphic" values="0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0"/>
    <feComponentTransfer result="shown"><feFuncA type="discrete"/></feComponentTransfer>
    <feComposite in="color" in2="shown" operator="in"/></filter></svg>`);
  let scale, x, y, frame = 0;  // screen pixels per slide pixel, and the place in the middle of the stage

  function paint() {
    const hidden = new Set(checks.filter((box) => !box.checked).map((box) => +box.value));
    const listed = new Set(slide.listed), shown = slide.colors.map((_, i) => +(listed.has(i) && !hidden.has(i)));
    stage.querySelector("feFuncA").setAttribute("tableValues", shown.join(" "));
    labels.style.filter = "none";
    labels.getBoundingClientRect();  // a filter that only changes inside is not always drawn again
    labels.style.filter = `url(#paint-${number})`;
    labels.style.opacity = range.value;
  }

  const least = () => Math.min(stage.clientWidth / width, stage.clientHeight / height);
  function whole() { [scale, x, y] = [least(), width / 2, height / 2]; move(0, 0); }
  function move(dx, dy) {
    x = Math.min(Math.max(x + dx / scale, 0), width);
    y = Math.min(Math.max(y + dy / scale, 0), height);
    frame ||= requestAnimationFrame(draw);
  }
  function zoom(factor, px = stage.clientWidth / 2, py = stage.clientHeight / 2) {
    const before = scale, [dx, dy] = [px - stage.clientWidth / 2, py - stage.clientHeight / 2];
    scale = Math.min(Math.max(scale * factor, least() / 2), Math.max(32, least()));
    x += dx / before - dx / scale;
    y += dy / before - dy / scale;
    move(0, 0);
  }

  function draw() {
    frame = 0;
    const dots = window.devicePixelRatio || 1, view = [stage.clientWidth * dots, stage.clientHeight * dots].map(Math.round);
    const left = x - stage.clientWidth / scale / 2, top = y - stage.clientHeight / scale / 2;
    for (const layer of layers) {
      const {canvas} = layer, context = canvas.getContext("2d");
      if (canvas.width !== view[0] || canvas.height !== view[1]) [canvas.width, canvas.height] = view;
      context.clearRect(0, 0, ...view);
      context.imageSmoothingEnabled = canvas !== labels && layer.levels.at(-1).pixel[0] * scale < 4;
      const fits = layer.levels.findIndex((level) => level.pixel[0] * scale * dots <= 1.4);
      const best = fits < 0 ? layer.levels.length - 1 : fits;
      for (let n = 0; n <= best; n++) {  // coarser tiles below, as long as finer ones are on their way
        if (n && n < best - 1) continue;
        const {pixel, size} = layer.levels[n], side = pixel.map((p) => p * slide.tile);
        const first = [left / side[0], top / side[1]].map((v) => Math.max(Math.floor(v), 0));
        const last = [(left + view[0] / dots / scale) / side[0], (top + view[1] / dots / scale) / side[1]];
        for (let row = first[1]; row < Math.min(last[1], size[1] / slide.tile); row++) {
          for (let column = first[0]; column < Math.min(last[0], size[0] / slide.tile); column++) {
            const image = tile(layer, `${n}/${row}_${column}`);
            if (!image.complete || !image.naturalWidth) continue;
            const at = (v, from) => Math.round((v - from) * scale * dots);
            const [x0, y0] = [at(column * side[0], left), at(row * side[1], top)];
            const x1 = at(column * side[0] + image.naturalWidth * pixel[0], left);
            const y1 = at(row * side[1] + image.naturalHeight * pixel[1], top);
            context.drawImage(image, x0, y0, x1 - x0, y1 - y0);
          }
        }
      }
    }
    measure();
  }
  function tile(layer, key) {
    if (!layer.tiles.has(key)) {
      if (layer.tiles.size > 600) layer.tiles.clear();
      const image = new Image();
      image.onload = () => { frame ||= requestAnimationFrame(draw); };
      image.src = layer.inside[key] || `${layer.path}${key}.${layer.suffix}`;
      layer.tiles.set(key, image);
    }
    return layer.tiles.get(key);
  }
  function measure() {
    const unit = slide.um || 1, longest = 160 / scale * unit, power = 10 ** Math.floor(Math.log10(longest));
    const length = power * [5, 2, 1].find((n) => n * power <= longest);
    bar.style.width = `${length / unit * scale}px`;
    bar.textContent = !slide.um ? `${length} px` : length >= 1000 ? `${length / 1000} mm` : `${+length.toPrecision(2)} \u00b5m`;
    stage.dataset.view = [x, y, scale].map((v) => v.toFixed(4)).join(" ");
  }

  const pointers = new Map(), place = (e) => {
    const box = stage.getBoundingClientRect();
    return [e.clientX - box.left, e.clientY - box.top];
  };
  stage.addEventListener("pointerdown", (e) => {
    if (e.target.closest("button")) return;
    pointers.set(e.pointerId, place(e));
    if (e.isTrusted) stage.setPointerCapture(e.pointerId);
  });
  stage.addEventListener("pointermove", (e) => {
    const [px, py] = place(e), before = pointers.get(e.pointerId);
    const world = [x, y].map((v, i) => Math.floor(v + ([px, py][i] - [stage.clientWidth, stage.clientHeight][i] / 2) / scale));
    root.querySelector("output").textContent = `x ${world[0]}, y ${world[1]}`;
    if (!before) return;
    const other = [...pointers].find(([id]) => id !== e.pointerId)?.[1];
    const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
    if (other) zoom(apart([px, py]) / Math.max(apart(before), 1), ...other);
    else move(before[0] - px, before[1] - py);
    pointers.set(e.pointerId, [px, py]);
  });
  for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, (e) => pointers.delete(e.pointerId));
  stage.addEventListener("wheel", (e) => {
    if (document.activeElement !== stage && !e.ctrlKey) return;  // else the page could not be scrolled over a slide
    e.preventDefault();
    zoom(2 ** (-e.deltaY / 240), ...place(e));
  }, {passive: false});
  stage.addEventListener("dblclick", (e) => { if (!e.target.closest("button")) zoom(e.shiftKey ? 0.5 : 2, ...place(e)); });
  const step = 80, keys = {ArrowLeft: () => move(-step, 0), ArrowRight: () => move(step, 0), ArrowUp: () => move(0, -step),
    ArrowDown: () => move(0, step), "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), "0": whole};
  stage.addEventListener("keydown", (e) => {
    if (!keys[e.key] || e.ctrlKey || e.metaKey) return;
    e.preventDefault();
    keys[e.key]();
  });
  for (const button of root.querySelectorAll("button")) {
    button.onclick = () => (+button.dataset.zoom ? zoom(+button.dataset.zoom) : whole());
  }
  [range, ...checks].forEach((input) => input.addEventListener("input", paint));
  new ResizeObserver(() => move(0, 0)).observe(stage);
  paint();
  whole();
});
