// Pictures and masks are held here, in the browser, and sent with the click that needs them.
(() => {
  "use strict";
  const LARGEST_GALLERY = 24;
  const limits = { pixels: 4200000 };
  const fields = {};
  let language = "en";

  const load = (url) =>
    new Promise((resolve, reject) => {
      const image = new Image();
      image.onload = () => resolve(image);
      image.onerror = reject;
      image.src = url;
    });

  const canvasOf = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

  class PictureField {
    constructor(root) {
      this.root = root;
      this.name = root.dataset.picture;
      this.hasMask = root.dataset.mask === "1";
      this.image = root.querySelector("img");
      this.canvas = root.querySelector("canvas");
      this.url = "";
      this.last = null;
      this.tool("file").addEventListener("change", (event) => this.choose(event.target.files[0]));
      if (!this.hasMask) return;
      this.canvas.addEventListener("pointerdown", (event) => this.begin(event));
      this.canvas.addEventListener("pointermove", (event) => this.move(event));
      for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, () => (this.last = null));
      this.tool("clear").addEventListener("click", () => this.clear());
      this.tool("invert").addEventListener("click", () => this.invert());
      this.tool("mask").addEventListener("change", (event) => this.chooseMask(event.target.files[0]));
    }

    tool(name) {
      return this.root.querySelector(`[data-tool="${name}"]`);
    }

    note(key) {
      const note = this.tool("note");
      note.textContent = key ? window.cogview2.texts[key][language] : "";
    }

    async choose(file) {
      if (!file) return;
      const url = URL.createObjectURL(file);
      try {
        await this.show(url);
      } catch {
        this.reset();
        this.note("unreadable");
      } finally {
        URL.revokeObjectURL(url);
      }
    }

    // Draws the picture anew: upright, as PNG, and no larger than the server takes.
    async show(url) {
      const source = await load(url);
      const [width, height] = [source.naturalWidth, source.naturalHeight];
      const scale = Math.min(1, Math.sqrt(limits.pixels / (width * height)));
      const copy = canvasOf(Math.max(1, Math.floor(width * scale)), Math.max(1, Math.floor(height * scale)));
      copy.getContext("2d").drawImage(source, 0, 0, copy.width, copy.height);
      this.url = copy.toDataURL("image/png");
      this.image.src = this.url;
      this.image.alt = window.cogview2.texts.picture[language];
      this.canvas.width = copy.width;
      this.canvas.height = copy.height;
      this.canvas.setAttribute("aria-label", window.cogview2.texts.mask[language]);
      this.root.querySelector(".cv-stage").hidden = false;
      this.note(scale < 1 ? "too_large" : "");
    }

    reset() {
      this.url = "";
      this.root.querySelector(".cv-stage").hidden = true;
    }

    point(event) {
      const box = this.canvas.getBoundingClientRect();
      const scale = this.canvas.width / box.width;
      return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale, scale };
    }

    begin(event) {
      this.canvas.setPointerCapture(event.pointerId);
      this.last = this.point(event);
      this.stroke(this.last);
    }

    move(event) {
      if (this.last) this.stroke(this.point(event));
    }

    stroke(to) {
      const pen = this.canvas.getContext("2d");
      pen.globalCompositeOperation = this.tool("eraser").checked ? "destination-out" : "source-over";
      pen.strokeStyle = "#e02020";
      pen.lineCap = pen.lineJoin = "round";
      pen.lineWidth = Number(this.tool("size").value) * to.scale;
      pen.beginPath();
      pen.moveTo(this.last.x, this.last.y);
      pen.lineTo(to.x, to.y + 0.01);
      pen.stroke();
      this.last = to;
    }

    clear() {
      this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    }

    invert() {
      const pen = this.canvas.getContext("2d");
      pen.globalCompositeOperation = "xor";
      pen.fillStyle = "#e02020";
      pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    }

    async chooseMask(file) {
      if (!file || !this.url) return;
      const url = URL.createObjectURL(file);
      try {
        const source = await load(url);
        const copy = canvasOf(this.canvas.width, this.canvas.height);
        const pen = copy.getContext("2d");
        pen.drawImage(source, 0, 0, copy.width, copy.height);
        const data = pen.getImageData(0, 0, copy.width, copy.height);
        for (let at = 0; at < data.data.length; at += 4) {
          const [red, green, blue, alpha] = data.data.slice(at, at + 4);
          const painted = alpha < 128 || 0.299 * red + 0.587 * green + 0.114 * blue >= 128;
          data.data.set([224, 32, 32, painted ? 255 : 0], at);
        }
        this.canvas.getContext("2d").putImageData(data, 0, 0);
        this.note("");
      } catch {
        this.note("unreadable");
      } finally {
        URL.revokeObjectURL(url);
      }
    }

    mask() {
      if (!this.hasMask || !this.url) return "";
      const copy = canvasOf(this.canvas.width, this.canvas.height);
      const pen = copy.getContext("2d");
      pen.drawImage(this.canvas, 0, 0);
      const data = pen.getImageData(0, 0, copy.width, copy.height);
      for (let at = 0; at < data.data.length; at += 4) {
        const value = data.data[at + 3] >= 128 ? 255 : 0;
        data.data.set([value, value, value, 255], at);
      }
      pen.putImageData(data, 0, 0);
      return copy.toDataURL("image/png");
    }
  }

  // Results go into the gallery once they are done; the oldest ones leave it.
  const collect = (result) => {
    const gallery = document.querySelector("[data-gallery]");
    if (!gallery || result.dataset.collected) return;
    result.dataset.collected = "1";
    for (const figure of result.querySelectorAll("figure")) {
      const url = figure.querySelector("img").src;
      if ([...gallery.querySelectorAll("img")].some((image) => image.src === url)) continue;
      gallery.prepend(figure.cloneNode(true));
    }
    while (gallery.children.length > LARGEST_GALLERY) gallery.lastElementChild.remove();
  };

  const translate = (root) => {
    for (const element of root.querySelectorAll(`[data-${language}]`)) {
      const words = element.dataset[language];
      if (element.textContent !== words) element.textContent = words;
    }
  };

  const update = () => {
    for (const root of document.querySelectorAll(".cv-picture:not([data-ready])")) {
      root.dataset.ready = "1";
      fields[root.dataset.picture] = new PictureField(root);
    }
    for (const result of document.querySelectorAll('.cv-result[data-state="done"]')) collect(result);
    translate(document);
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-send]");
    if (!button) return;
    const name = button.dataset.send;
    document.querySelector(`#cv-tab-${name}-button, [role="tab"][aria-controls="cv-tab-${name}"]`)?.click();
    const url = button.closest("figure").querySelector("img").src;
    for (let tries = 0; tries < 50 && !fields[name]; tries++) await new Promise((next) => setTimeout(next, 100));
    await fields[name]?.show(url);
  });

  window.cogview2 = {
    texts: {},
    setLimits: (pixels) => (limits.pixels = pixels),
    setLanguage: (chosen) => {
      language = chosen;
      document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
      update();
    },
    picture: (name) => fields[name]?.url ?? "",
    mask: (name) => fields[name]?.mask() ?? "",
  };

  new MutationObserver(update).observe(document.documentElement, { childList: true, subtree: true });
  update();
})();
