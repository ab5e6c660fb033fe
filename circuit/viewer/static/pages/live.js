// Ask and trace: a prompt, the model's answer, and any token of either traced.

import { html } from "../vendor/preact.js";
import { percent, token } from "../core/format.js";

export function LivePage({ route, live, act }) {
  const { answer, working, problem, job } = live;
  const mine = answer?.run === route.run ? answer : null;
  return html`<article class="livepage"><h1>Ask and trace</h1>
    <p class="soft">Type a prompt and let the model of <b>${route.run}</b> go on. A click on any token, of the prompt or of the answer, traces how the model came to it.</p>
    <form onSubmit=${(event) => { event.preventDefault(); act.askModel(); }}>
      <textarea class="wide" rows="3" maxlength="20000" aria-label="prompt" value=${route.prompt} onInput=${(event) => act.go({ prompt: event.target.value })}
        onKeyDown=${(event) => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); act.askModel(); } }}></textarea>
      <button class="plain main" type="submit" disabled=${working || !route.prompt.trim()}>${working ? "Answering…" : "Answer"}</button></form>
    ${problem && html`<p class="problem-text" role="alert">${problem}</p>`}
    ${mine && html`<div class="said" aria-label="prompt and answer">${mine.tokens.map((text, position) => html`<button key=${position} class=${position >= mine.prompt_length ? "said-token answer" : "said-token"} disabled=${position === 0 || job?.state === "running"}
        title=${position === 0 ? "nothing comes before it" : `trace “${token(text)}”`} onClick=${() => act.traceAt(mine.ids, position)}>${token(text)}</button>`)}
        <button class="said-token next" disabled=${job?.state === "running"} onClick=${() => act.traceAt(mine.ids, mine.prompt_length)} title="trace what comes next">what comes after the prompt</button></div>
      <h3>after the prompt</h3><div class="words">${mine.next.map(([text, p]) => html`<span class="word">${token(text)} ${percent(p)}</span>`)}</div>`}</article>`;
}

export function JobBar({ job, act }) {
  if (!job || job.state === "done") return null;
  const share = job.total ? Math.min(1, job.done / job.total) : null;
  return html`<div class="job" role="group" aria-label="trace at work">
    ${job.state === "running"
      ? html`<span>${job.label}${job.total ? ` ${Math.round(job.done)} of ${Math.round(job.total)}` : "…"}</span><progress value=${share} max="1" aria-label="how far the trace is"></progress><button class="plain" onClick=${act.cancelJob}>Cancel</button>`
      : html`<span>${job.state === "cancelled" ? "trace cancelled" : job.error}</span><button class="plain" onClick=${act.closeJob}>Close</button>`}</div>`;
}
