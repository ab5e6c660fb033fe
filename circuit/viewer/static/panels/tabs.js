// Tabs with their panels: one tab stop, arrows move between them.

import { html } from "../vendor/preact.js";

export function Tabs({ name, tabs, open, choose, children }) {
  const ids = tabs.map(([id]) => id);
  const press = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = ids[(ids.indexOf(open) + step + ids.length) % ids.length];
    choose(next);
    requestAnimationFrame(() => document.getElementById(`${name}-tab-${next}`)?.focus());
  };
  return html`<div class="tabbed"><div class="tabs" role="tablist" aria-label=${name} onKeyDown=${press}>
      ${tabs.map(([id, title]) => html`<button role="tab" id=${`${name}-tab-${id}`} aria-controls=${`${name}-panel`} aria-selected=${String(id === open)} tabindex=${id === open ? 0 : -1} onClick=${() => choose(id)}>${title}</button>`)}</div>
    <div class="panel" role="tabpanel" id=${`${name}-panel`} aria-labelledby=${`${name}-tab-${open}`} tabindex="0">${children}</div></div>`;
}
