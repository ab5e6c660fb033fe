// The keys.

import { html, useEffect, useRef } from "../vendor/preact.js";

export const KEYS = [
  ["← ↑ → ↓", "from node to node (when the graph has the focus)"], ["p", "pin or unpin the chosen node"], ["/", "search"],
  ["Esc", "let go of node and search"], ["[ ]", "fewer or more nodes"], ["f", "fit everything into view"], ["e", "errors"],
  ["Ctrl z", "undo"], ["Ctrl Shift z", "redo"], ["n", "the chosen node’s panel"], ["l", "the list of nodes"], ["a", "attention"], ["s", "steer"], ["?", "this sheet"],
];

export function Help({ close }) {
  const box = useRef();
  useEffect(() => {
    const before = document.activeElement;
    box.current.showModal();
    return () => before?.focus?.();
  }, []);
  return html`<dialog ref=${box} class="help" aria-labelledby="help-title" onClose=${close} onClick=${(event) => { if (event.target === box.current) box.current.close(); }}>
    <h2 id="help-title">Keys</h2>
    <dl>${KEYS.map(([key, what]) => html`<dt><kbd>${key}</kbd></dt><dd>${what}</dd>`)}</dl>
    <p class="soft">The wheel zooms, dragging pans. Shift-click pins a node; in the subgraph it chooses several boxes, which “Group…” makes one. Boxes can be dragged.
      Search takes words and filters: <code>layer:2</code>, <code>layer:2-5</code>, <code>act>3</code>, <code>label~texas</code>, <code>token:Dallas</code>, <code>feature:310</code>, <code>kind:error</code>, <code>influence>0.01</code>.</p>
    <button class="plain" onClick=${() => box.current.close()}>Close</button></dialog>`;
}
