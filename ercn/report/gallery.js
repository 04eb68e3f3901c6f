// Overlays of the pictures: map, opacity and outlines are one state for the whole page.
(() => {
  "use strict";
  const bytes = atob(document.getElementById("lookup").textContent.trim());
  const color = (level, channel) => bytes.charCodeAt(3 * level + channel);
  const state = { map: null, outlines: true, opacity: Number(document.body.dataset.opacity) };
  const decoded = new Map(); // data URI -> its grey levels, once decoded

  const levels = (source) => {
    if (!decoded.has(source)) {
      decoded.set(source, (async () => {
        const image = new Image();
        image.src = source;
        await image.decode();
        const canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth;
        canvas.height = image.naturalHeight;
        const context = canvas.getContext("2d", { willReadFrequently: true });
        context.drawImage(image, 0, 0);
        return context.getImageData(0, 0, canvas.width, canvas.height);
      })());
    }
    return decoded.get(source);
  };

  // opacity * heat of the colour of the heat, over the picture in grey
  const paint = async (canvas) => {
    const { map, opacity } = state;
    const source = canvas.dataset[map];
    const grey = source ? await levels(source) : null;
    if (map !== state.map || opacity !== state.opacity) return; // changed while decoding
    canvas.width = grey ? grey.width : 1;
    canvas.height = grey ? grey.height : 1;
    if (!grey) return;
    const painted = new ImageData(grey.width, grey.height);
    for (let i = 0; i < painted.data.length; i += 4) {
      const level = grey.data[i];
      for (let channel = 0; channel < 3; channel++) painted.data[i + channel] = color(level, channel);
      painted.data[i + 3] = Math.round(opacity * level);
    }
    canvas.getContext("2d").putImageData(painted, 0, 0);
  };

  const apply = () => {
    document.body.classList.toggle("hot", state.map !== "picture");
    document.body.classList.toggle("plain", state.map === "picture");
    document.body.classList.toggle("bare", !state.outlines);
    for (const tools of document.querySelectorAll(".tools")) {
      for (const input of tools.querySelectorAll("[data-map]")) input.checked = input.dataset.map === state.map;
      const outlines = tools.querySelector("[data-outlines]");
      if (outlines) outlines.checked = state.outlines;
      tools.querySelector("[data-opacity]").value = state.opacity;
    }
    for (const canvas of document.querySelectorAll(".stage canvas")) {
      if (canvas.closest("dialog[open]") || canvas.closest("details[open]")) paint(canvas);
    }
  };

  const listen = (tools) => {
    tools.hidden = false;
    tools.addEventListener("input", ({ target }) => {
      if (target.dataset.map) state.map = target.dataset.map;
      if ("outlines" in target.dataset) state.outlines = target.checked;
      if ("opacity" in target.dataset) state.opacity = Number(target.value);
      apply();
    });
  };

  const galleries = [...document.querySelectorAll(".gallery")];
  if (!galleries.length) return;
  state.map = galleries[0].querySelector("[data-map]:not([data-map=picture])").dataset.map;
  for (const gallery of galleries) listen(gallery.querySelector(".tools"));
  for (const part of document.querySelectorAll("details.part")) part.addEventListener("toggle", apply);

  // the large view
  const dialog = document.getElementById("large");
  let cases = [];
  let at = 0;
  const show = (index) => {
    at = (index + cases.length) % cases.length;
    dialog.style.setProperty("--views", cases[at].querySelectorAll(".stage").length);
    dialog.querySelector(".count").textContent = `Picture ${at + 1} of ${cases.length}`;
    const body = document.createElement("div");
    body.className = "stages";
    for (const part of cases[at].querySelector(".stages").children) body.append(part.cloneNode(true));
    dialog.querySelector(".body").replaceChildren(body);
    apply();
  };
  const open = (gallery, index) => {
    cases = [...gallery.querySelectorAll(".case")];
    const tools = gallery.querySelector(".tools").cloneNode(true);
    for (const radio of tools.querySelectorAll("input[type=radio]")) radio.name = "large";
    dialog.querySelector(".controls").replaceChildren(tools);
    listen(tools);
    dialog.showModal();
    show(index);
  };
  for (const gallery of galleries) {
    [...gallery.querySelectorAll(".case .stages")].forEach((button, index) => {
      button.disabled = false;
      button.addEventListener("click", () => open(gallery, index));
    });
  }
  dialog.querySelector("[data-turn=back]").addEventListener("click", () => show(at - 1));
  dialog.querySelector("[data-turn=on]").addEventListener("click", () => show(at + 1));
  dialog.querySelector("[data-turn=close]").addEventListener("click", () => dialog.close());

  let touched = null; // a swipe turns the picture
  dialog.addEventListener("touchstart", (event) => { touched = event.target.closest(".stage") && event.changedTouches[0]; });
  dialog.addEventListener("touchend", ({ changedTouches: [end] }) => {
    if (touched && Math.abs(end.clientX - touched.clientX) > 60 && Math.abs(end.clientY - touched.clientY) < 60) {
      show(at + (end.clientX < touched.clientX ? 1 : -1));
    }
    touched = null;
  });

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const scope = dialog.open ? dialog : galleries[0];
    const maps = [...scope.querySelectorAll("[data-map]")].map((input) => input.dataset.map);
    const number = Number(event.key);
    if (number >= 1 && number <= maps.length) state.map = maps[number - 1];
    else if (event.key === "l" || event.key === "L") state.outlines = !state.outlines;
    else if (dialog.open && !event.target.matches("input") && event.key === "ArrowLeft") return show(at - 1);
    else if (dialog.open && !event.target.matches("input") && event.key === "ArrowRight") return show(at + 1);
    else return;
    apply();
  });
  apply();
})();
