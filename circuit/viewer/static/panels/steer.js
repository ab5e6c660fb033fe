import { html } from "../vendor/preact.js";
export function Steer() { return html`<p class="soft">soon</p>`; }
