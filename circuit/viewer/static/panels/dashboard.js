// One feature's dashboard: what it fires on, what it makes likelier, how strongly and how often.

import { html } from "../vendor/preact.js";
import { number, token } from "../core/format.js";

export function Dashboard({ record, act }) {
  const strongest = Math.max(record.act_max, 1e-30);
  return html`
    <dl class="facts"><dt>fires on</dt><dd>${number(100 * record.activation_frequency)}% of tokens</dd>
      <dt>activation</dt><dd>${number(record.act_min)} to ${number(record.act_max)}</dd></dl>
    ${record.histogram.some((count) => count > 0) && html`<${Bars} histogram=${record.histogram} />`}
    ${record.top_logits.length > 0 && html`<h3>makes likelier</h3><${Words} list=${record.top_logits} />`}
    ${record.bottom_logits.length > 0 && html`<h3>makes less likely</h3><${Words} list=${record.bottom_logits} />`}
    <${Neighbours} title="driven by, on every prompt" list=${record.inputs} act=${act} />
    <${Neighbours} title="drives, on every prompt" list=${record.outputs} act=${act} />
    ${record.examples_quantiles.map((group) => html`<h3>${group.quantile_name}</h3>${group.examples.map((one) => html`<${Example} example=${one} strongest=${strongest} />`)}`)}
    ${record.examples_quantiles.length === 0 && html`<p class="soft">never fired on the text that was read</p>`}`;
}

const Words = ({ list }) => html`<div class="words">${list.map((word) => html`<span class="word">${token(word)}</span>`)}</div>`;

// other features by their TWERA: the virtual weight times how the two fire together
const Neighbours = ({ title, list, act }) => list?.length > 0 && html`<h3>${title}</h3><div class="words">${list.map(([layer, feature, twera, virtual, label]) => html`<button class="word" title=${`L${layer}:${feature}, weight ${number(virtual)} by itself`} disabled=${!act} onClick=${() => act.go({ layer: String(layer), feature: String(feature) })}><b>${label || `L${layer}:${feature}`}</b> ${twera > 0 ? "+" : "−"}${number(Math.abs(twera))}</button>`)}</div>`;

function Example({ example, strongest }) {
  const peak = example.tokens_acts_list.indexOf(Math.max(...example.tokens_acts_list));
  return html`<p class="example">${example.tokens.map((text, i) => {
    const share = Math.max(0, Math.min(1, example.tokens_acts_list[i] / strongest));
    return html`<span class=${i === peak ? "peak" : null} style=${share > 0 ? { backgroundColor: `rgb(var(--hot) / ${(0.12 + 0.6 * share).toFixed(2)})` } : null}
      title=${share > 0 ? number(example.tokens_acts_list[i]) : null}>${text.replaceAll("\n", "⏎\n")}</span>`;
  })}</p>`;
}

function Bars({ histogram }) {
  const most = Math.max(...histogram);
  return html`<svg class="bars" viewBox=${`0 0 ${histogram.length * 10} 50`} preserveAspectRatio="none" role="img" aria-label="how often each strength occurs">
    ${histogram.map((count, i) => { const tall = count ? Math.max(1.5, (48 * count) / most) : 0; return html`<rect x=${i * 10 + 1} y=${50 - tall} width="8" height=${tall} />`; })}</svg>`;
}
