// One feature's dashboard: what it fires on, what it makes likelier, how strongly and how often.

import { el, number, svg, token } from "./dom.js";

export function featureDashboard(answer, { layer, feature }) {
  const record = answer.record;
  return [
    el("h1", {}, answer.label || `feature ${feature}`),
    el("p", { class: "soft" }, `layer ${layer}, feature ${feature}`,
      answer.source ? ` · label from ${{ truth: "ground truth", tokens: "its tokens", hand: "a person" }[answer.source]}` : ""),
    ...dashboard(record),
  ];
}

export function dashboard(record) {
  const parts = [
    el("dl", { class: "facts" },
      el("dt", {}, "fires on"), el("dd", {}, `${number(100 * record.activation_frequency)}% of tokens`),
      el("dt", {}, "activation"), el("dd", {}, `${number(record.act_min)} to ${number(record.act_max)}`)),
  ];
  if (record.histogram.some((count) => count > 0)) parts.push(bars(record.histogram));
  if (record.top_logits.length) parts.push(el("h3", {}, "makes likelier"), words(record.top_logits));
  if (record.bottom_logits.length) parts.push(el("h3", {}, "makes less likely"), words(record.bottom_logits));
  const strongest = Math.max(record.act_max, 1e-30);
  for (const group of record.examples_quantiles) {
    parts.push(el("h3", {}, group.quantile_name), ...group.examples.map((one) => example(one, strongest)));
  }
  if (!record.examples_quantiles.length) parts.push(el("p", { class: "soft" }, "never fired on the text that was read"));
  return parts;
}

function words(list) {
  return el("div", { class: "words" }, list.map((word) => el("span", { class: "word" }, token(word))));
}

function bars(counts) {
  const most = Math.max(...counts.map(Math.log1p));
  const width = 100 / counts.length;
  return svg("svg", { class: "bars", viewBox: "0 0 100 54", preserveAspectRatio: "none", role: "img", "aria-label": "histogram of activations" },
    counts.map((count, i) => {
      const height = (52 * Math.log1p(count)) / most;
      return svg("rect", { x: i * width, y: 54 - height, width: width * 0.86, height });
    }));
}

function example(one, strongest) {
  const peak = one.tokens_acts_list.indexOf(Math.max(...one.tokens_acts_list));
  const line = el("div", { class: "example" });
  one.tokens.forEach((text, i) => {
    const act = one.tokens_acts_list[i];
    const piece = el("span", { title: act > 0 ? number(act) : null, class: i === peak ? "peak" : null }, text.replaceAll("\n", "⏎"));
    if (act > 0) piece.style.backgroundColor = `rgb(var(--hot) / ${(0.12 + 0.7 * Math.min(1, act / strongest)).toFixed(3)})`;
    line.append(piece);
  });
  return line;
}
