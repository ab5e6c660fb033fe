// Attention: where a head looked from one token, and because of what.

import { html, useState } from "../vendor/preact.js";
import { keyOf, pattern, recordedLook, sourceOf } from "../core/attention.js";
import { formatLook } from "../core/changes.js";
import { nodeName, number, percent, token } from "../core/format.js";

export function Heads({ model, kept, asked, answered, act, canAsk }) {
  const own = asked && recordedLook(model.attention, asked);
  const look = own ? { answer: own } : asked && answered && formatLook(answered) === formatLook(asked) ? answered : null;
  const recorded = model.attention?.attention ?? [];
  return html`<h2>Attention</h2>
    ${recorded.length > 0 && html`<p class="soft small">The heads that carry most of this graph’s influence:</p>
      <div class="words">${recorded.map((one) => html`<button class="plain" key=${`${one.layer}/${one.head}`} aria-pressed=${String(look?.answer === one)} onClick=${() => act.explainHead({ layer: one.layer, head: one.head, query: one.query })}>${headName(one)} from “${token(model.tokens[one.query])}”</button>`)}</div>`}
    ${canAsk && html`<${Question} model=${model} act=${act} />`}
    ${!look && asked && canAsk && html`<button class="plain" onClick=${() => act.explainHead(asked)}>Why did ${headName(asked)} look there?</button>`}
    ${!look && !asked && !recorded.length && html`<p class="soft">A graph freezes attention: it says that something travels, not through which head, nor why that head looked there. Ask here, or open an edge of a node and choose one of its heads.</p>`}
    ${look && (look.problem ? html`<p class="problem-text" role="alert">${look.problem}</p>` : look.answer ? html`<${Look} key=${`${look.answer.layer}/${look.answer.head}/${look.answer.query}`} ...${{ model, kept, look: look.answer, act }} />` : html`<p class="soft">asking the model…</p>`)}`;
}

const headName = ({ layer, head }) => `L${layer}H${head}`;

function Question({ model, act }) {
  const [asked, setAsked] = useState({ layer: 0, head: 0, query: model.tokens.length - 1 });
  const field = (name, label, most) => html`<label>${label} <input type="number" min="0" max=${most} value=${asked[name]} aria-label=${`attention: ${label}`} onInput=${(event) => setAsked({ ...asked, [name]: Math.max(0, Math.min(most, Math.round(Number(event.target.value)) || 0)) })} /></label>`;
  return html`<form class="actions" onSubmit=${(event) => { event.preventDefault(); act.explainHead(asked); }}>
    ${field("layer", "layer", Math.max(0, model.layers - 1))}${field("head", "head", 999)}
    <label>from <select class="narrow" aria-label="attention: from token" onChange=${(event) => setAsked({ ...asked, query: Number(event.target.value) })}>${model.tokens.map((text, position) => html`<option value=${position} selected=${position === asked.query}>${position} “${token(text)}”</option>`)}</select></label>
    <button class="plain" type="submit">Ask why</button></form>`;
}

function Look({ model, kept, look, act }) {
  const [key, setKey] = useState(look.carried?.key ?? look.keys[0]?.key);
  const found = keyOf(look, key);
  const seen = pattern(look, model.tokens), explained = new Set(look.keys.map((one) => one.key));
  const name = (source) => { const { text, i } = sourceOf(model, kept, source, nodeName); return i < 0 ? text : html`<button class="quiet source" onClick=${() => act.choose(i)}>${text}</button>`; };
  const most = Math.max(...seen.map((one) => one.share ?? 0), 1e-30);
  return html`<section aria-label="Why this head looked there">
    <h3 class="said-of">${headName(look)} from ${look.query} “${token(model.tokens[look.query])}” looked at</h3>
    <p class="pattern">${seen.slice(0, look.query + 1).map((one) => html`<button key=${one.position} class="seen" disabled=${!explained.has(one.position)} aria-pressed=${String(one.position === key)} title=${`${percent(one.share)}, score ${number(one.score)}`}
      style=${{ backgroundColor: `rgb(var(--hot) / ${(0.75 * (one.share ?? 0) / most).toFixed(2)})` }} onClick=${() => setKey(one.position)}>${token(one.text)}<small>${one.share >= 0.01 ? percent(one.share) : ""}</small></button>`)}</p>
    ${found && html`<h3 class="said-of">because of, at ${key} “${token(model.tokens[key])}” (score ${number(look.scores[String(key)])})</h3>
      <table class="terms"><thead><tr><th>asked by</th><th>answered by</th><th>score</th></tr></thead><tbody>
        ${found.pairs.slice(0, 8).map(([query, answer, value]) => html`<tr><td>${name(query)}</td><td>${name(answer)}</td><td class=${value < 0 ? "num minus" : "num"}>${value > 0 ? "+" : "−"}${number(Math.abs(value))}</td></tr>`)}</tbody></table>
      <h3 class="said-of">without it, the share of this token</h3>
      <table class="terms"><tbody>${found.silenced.filter(([, , , exact], rank) => !rank || Math.abs(exact) > 0.005).slice(0, 6).map(([source, , , exact]) => html`<tr><td>${name(source)}</td><td class=${exact < 0 ? "num minus" : "num"}>× ${number(Math.exp(exact), 2)}</td></tr>`)}</tbody></table>
      <p class="soft small">Pairs are terms of one sum, the score before the softmax (${number(found.remainder.pairs)} of it lies in pairs not listed, both signs are given). The second table is exact, through the softmax.</p>`}</section>`;
}
