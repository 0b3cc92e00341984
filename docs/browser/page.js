// The page: what is asked for, how far it is, and the picture. The worker does the work.

const TEXTS = {
  en: {
    title: "Draw in your browser",
    prompt: "What to draw",
    example: "a tiger on a blue background",
    style: "Style",
    seed: "Seed",
    greedy: "The likeliest tokens only",
    draw: "Draw",
    save: "Save the picture",
    note: "The model is loaded once, about 35 MB, and runs on your device. Nothing that you write leaves it.",
    loading: (percent) => `The model is loading: ${percent} %`,
    starting: "The model is getting ready.",
    ready: "Ready.",
    drawing: (percent) => `Drawing: ${percent} %`,
    done: (seconds) => `Done in ${seconds} s.`,
    unknown: (parts) => `The model does not know this, and goes by the rest: ${parts}`,
    nothing: (parts) => `The model knows nothing of the text: ${parts}`,
    empty: "Write what the picture shows.",
    long: ({ tokens, most }) => `The text is too long: it has ${tokens} tokens with its style, and may have ${most}. Shorten it.`,
    load: (message) => `The model could not be loaded (${message}). Reload the page to try again.`,
    broken: (message) => `The picture could not be drawn (${message}).`,
    other: "中文",
  },
  zh: {
    title: "在浏览器里画画",
    prompt: "画什么",
    example: "一只老虎，蓝色背景",
    style: "风格",
    seed: "随机种子",
    greedy: "只取最可能的标记",
    draw: "开始画",
    save: "保存图片",
    note: "模型只下载一次，约 35 MB，在您的设备上运行。您输入的内容不会离开设备。",
    loading: (percent) => `正在下载模型：${percent}%`,
    starting: "正在准备模型。",
    ready: "准备好了。",
    drawing: (percent) => `正在画：${percent}%`,
    done: (seconds) => `完成，用时 ${seconds} 秒。`,
    unknown: (parts) => `模型不认识这些内容，按其余部分来画：${parts}`,
    nothing: (parts) => `模型完全不认识这些文字：${parts}`,
    empty: "请写出图片的内容。",
    long: ({ tokens, most }) => `文字太长：连同风格共 ${tokens} 个标记，最多 ${most} 个。请缩短。`,
    load: (message) => `模型加载失败（${message}）。请刷新页面重试。`,
    broken: (message) => `没能画出图片（${message}）。`,
    other: "English",
  },
};

const $ = (id) => document.getElementById(id);
const asked = new URLSearchParams(location.search);
let language = asked.get("lang") ?? (navigator.language.startsWith("zh") ? "zh" : "en");
if (!(language in TEXTS)) language = "en";
let state = () => TEXTS[language].starting;
let warning = () => "";
let isReady = false;
let started = 0;

function show() {
  const texts = TEXTS[language];
  document.documentElement.lang = language;
  document.title = texts.title;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = texts[element.dataset.text];
  $("prompt").placeholder = texts.example;
  $("state").textContent = state();
  $("warning").textContent = warning();
}

function say(newState, value = null) {
  state = newState;
  if (value !== null) $("progress").value = value;
  show();
}

function allow(wanted) {
  isReady = wanted;
  $("draw").disabled = !wanted;
}

const worker = new Worker("worker.js", { type: "module" });
worker.onerror = (event) => say(() => TEXTS[language].load(event.message ?? "worker.js"));
worker.onmessage = ({ data }) => {
  const percent = (share) => Math.round(100 * share);
  if (data.kind === "loading") {
    const share = data.loaded / data.total;
    say(() => (share < 1 ? TEXTS[language].loading(percent(share)) : TEXTS[language].starting), share);
  } else if (data.kind === "ready") {
    $("style").replaceChildren(...data.styles.map((name) => new Option(name, name, false, name === data.defaultStyle)));
    $("style-row").hidden = data.styles.length < 2;
    allow(true);
    say(() => TEXTS[language].ready, 0);
  } else if (data.kind === "step") {
    say(() => TEXTS[language].drawing(percent(data.done / data.total)), data.done / data.total);
  } else if (data.kind === "unknown") {
    warning = () => TEXTS[language][data.hasRest ? "unknown" : "nothing"](data.parts.slice(0, 8).join(", "));
    show();
  } else if (data.kind === "picture") {
    const canvas = $("picture");
    [canvas.width, canvas.height] = [data.width, data.height];
    canvas.getContext("2d").putImageData(new ImageData(data.rgba, data.width, data.height), 0, 0);
    canvas.dataset.tokens = JSON.stringify(data.tokens);
    canvas.hidden = false;
    $("save").href = canvas.toDataURL("image/png");
    $("save").hidden = false;
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    allow(true);
    say(() => TEXTS[language].done(seconds), 1);
  } else if (data.kind === "refused") {
    allow(true);
    say(() => { const text = TEXTS[language][data.reason]; return typeof text === "string" ? text : text(data.details); }, 0);
  } else {
    allow(data.during !== "load");
    say(() => TEXTS[language][data.during === "load" ? "load" : "broken"](data.message), 0);
  }
};

$("order").onsubmit = (event) => {
  event.preventDefault();
  if (!isReady) return;
  warning = () => "";
  allow(false);
  started = performance.now();
  say(() => TEXTS[language].drawing(0), 0);
  const seed = Math.trunc(Number($("seed").value)) || 0;
  const order = { prompt: $("prompt").value, style: $("style").value || null, seed, greedy: $("greedy").checked };
  worker.postMessage({ kind: "draw", order });
};
$("language").onclick = () => {
  language = language === "en" ? "zh" : "en";
  show();
};

show();
worker.postMessage({ kind: "load", model: asked.get("model") ?? "model" });
