// The run's checkpoints: the same prompt, seen through the transcoder as it stood at each of them.

import { html, useEffect, useState } from "../vendor/preact.js";
import { address } from "../core/address.js";

export function Steps({ model, route, act }) {
  const { steps, traced } = model;
  const now = route.step === "" ? steps.length : steps.indexOf(Number(route.step));
  const [at, setAt] = useState(now);
  useEffect(() => setAt(now), [now]);
  const name = at === steps.length ? "finished" : `step ${steps[at]}`;
  const move = (event) => { const place = Number(event.target.value); setAt(place); act.toStep(place === steps.length ? null : steps[place]); };
  return html`<label class="steps">training <input type="range" min="0" max=${steps.length} step="1" value=${at} aria-label="checkpoint of the run" aria-valuetext=${name}
      onInput=${(event) => setAt(Number(event.target.value))} onChange=${move} /><span class="amount">${name}</span></label>
    ${route.step !== "" && html`<a class="plain" href=${address("compare", { run: route.run, slug: route.slug, step: route.step, with: route.slug })}>beside the finished one</a>`}
    ${at !== now && !traced.includes(steps[at]) && at < steps.length && html`<span class="soft small">will be traced</span>`}`;
}
