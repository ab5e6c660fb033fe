// The link graph: tokens across, layers up; the tokens below are buttons. Three canvases lie on each other: all that is
// shown, what is chosen, what is hovered, so that a click or a hover paints little.

import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../vendor/preact.js";
import { select, zoom as zooming, zoomIdentity } from "../vendor/d3.js";
import { layout, neighbour, LETTER } from "../core/layout.js";
import { nodeName, nodePlace, number, percent, token } from "../core/format.js";
import { linkAt, nodeAt, paintBase, paintChosen, paintOver, palette, radius } from "./paint.js";

const readZoom = (text) => {
  const [k, x, y] = text.split(",").map(Number);
  return text && [k, x, y].every(Number.isFinite) && k > 0 ? { k, x, y } : { k: 1, x: 0, y: 0 };
};

export function LinkGraph({ model, shown, kept, own, chosen, found, links, zoomText, theme, alone, act, onToken, label = "Link graph" }) {
  const holder = useRef(), base = useRef(), picked = useRef(), over = useRef(), zoomer = useRef(), later = useRef();
  const [[width, height], setSize] = useState([0, 0]);
  const [zoom, setZoom] = useState(() => readZoom(zoomText));
  const [hover, setHover] = useState({ node: -1, link: -1, x: 0, y: 0 });

  useLayoutEffect(() => {
    const measure = () => setSize([holder.current.clientWidth, holder.current.clientHeight]);
    const observer = new ResizeObserver(measure);
    observer.observe(holder.current);
    measure();
    return () => observer.disconnect();
  }, []);

  const scene = useSceneOf({ model, shown, kept, own, near: found, links, zoom, theme, width, height, holder, alone });

  useEffect(() => {
    const behaviour = zooming().scaleExtent([0.7, 24]).on("zoom", ({ transform: { k, x, y }, sourceEvent }) => {
      setZoom({ k, x, y });
      if (!sourceEvent) return;
      clearTimeout(later.current);
      later.current = setTimeout(() => act.go({ zoom: k === 1 && x === 0 && y === 0 ? "" : [k.toFixed(3), x.toFixed(0), y.toFixed(0)].join(",") }), 250);
    });
    zoomer.current = behaviour;
    select(over.current).call(behaviour).on("dblclick.zoom", null);
    return () => clearTimeout(later.current);
  }, []);

  useEffect(() => {
    const { k, x, y } = readZoom(zoomText);
    select(over.current).call(zoomer.current.transform, zoomIdentity.translate(x, y).scale(k));
  }, [zoomText]);

  useLayoutEffect(() => {
    if (width) paintBase(context(base.current, width, height), scene);
  }, [scene, width, height]);

  useLayoutEffect(() => {
    if (width) paintChosen(context(picked.current, width, height), scene, chosen);
  }, [scene, chosen, width, height]);

  useLayoutEffect(() => {
    if (width) paintOver(context(over.current, width, height), scene, hover.node === chosen ? -1 : hover.node);
  }, [scene, hover.node, chosen, width, height]);

  const move = (event) => {
    const { left, top } = over.current.getBoundingClientRect();
    const x = event.clientX - left, y = event.clientY - top;
    const node = nodeAt(scene, x, y);
    const link = node < 0 && chosen >= 0 ? linkAt(scene, chosen, x, y) : -1;
    if (node !== hover.node || link !== hover.link) setHover({ node, link, x, y });
  };
  const click = (event) => {
    const { left, top } = over.current.getBoundingClientRect();
    const node = nodeAt(scene, event.clientX - left, event.clientY - top);
    const link = node < 0 && chosen >= 0 ? linkAt(scene, chosen, event.clientX - left, event.clientY - top) : -1;
    if (node >= 0 && event.shiftKey) act.togglePin([node]);
    else if (link >= 0 && act.openEdge) act.openEdge(model.target[link], model.source[link]);
    else act.choose(node === chosen ? -1 : node);
  };
  const press = (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const next = chosen < 0 ? scene.order.at(-1) : neighbour(scene.at, shown, chosen, ...step);
    if (next !== undefined && next >= 0) act.choose(next);
  };

  const keys = "arrows move, p pins, f fits, ? shows all keys";
  return html`<div class="linkgraph">
    <div class="stage" ref=${holder} role="application" tabindex="0" aria-label=${`${label}; ${keys}`} onKeyDown=${press}>
      <canvas ref=${base} aria-hidden="true" class=${chosen >= 0 && !found ? "faded" : null}></canvas>
      <canvas ref=${picked} aria-hidden="true"></canvas>
      <canvas ref=${over} aria-hidden="true" onMouseMove=${move} onMouseLeave=${() => setHover({ node: -1, link: -1, x: 0, y: 0 })} onClick=${click}></canvas>
      ${hover.node >= 0 && html`<${Tip} scene=${scene} i=${hover.node} />`}
      ${hover.link >= 0 && html`<div class="tip" style=${{ left: `${Math.min(hover.x + 12, width - 240)}px`, top: `${hover.y + 14}px` }}>
        ${nodeName(model, kept, model.source[hover.link])} adds <b>${number(model.weight[hover.link])}</b> to ${nodeName(model, kept, model.target[hover.link])}</div>`}
    </div>
    <${Tokens} model=${model} at=${scene.at} zoom=${zoom} chosen=${chosen} act=${act} onToken=${onToken} />
  </div>`;
}

function useSceneOf({ model, shown, kept, own, near, links, zoom, theme, width, height, holder, alone }) {
  const at = useMemo(() => layout(model, shown, Math.max(width, 200), Math.max(height, 120)), [model, shown, width, height]);
  const colors = useMemo(() => (holder.current ? palette(holder.current) : {}), [theme, width > 0]);
  const order = useMemo(() => {
    const all = [];
    for (let i = 0; i < model.n; i++) if (shown[i]) all.push(i);
    return all.sort((a, b) => model.nodes[a].influence - model.nodes[b].influence);
  }, [model, shown]);
  const quiet = useMemo(() => {
    const some = [];
    for (let link = 0; link < model.source.length && some.length < links; link++) {
      if (shown[model.source[link]] && shown[model.target[link]]) some.push(link);
    }
    return some;
  }, [model, shown, links]);
  const mostNames = Math.round(Math.min(60, (width * height) / 16000) * Math.min(3, zoom.k));
  return useMemo(
    () => ({ model, shown, kept, own, at, zoom, colors, order, quiet, near, width, height, mostNames, alone }),
    [model, shown, kept, own, at, zoom, colors, order, quiet, near, width, height, mostNames, alone],
  );
}

function context(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  return ctx;
}

function Tip({ scene, i }) {
  const { model, kept, at, zoom, width } = scene;
  const node = model.nodes[i];
  const x = at.x[i] * zoom.k + zoom.x, y = at.y[i] * zoom.k + zoom.y;
  const amount = node.kind === "feature" ? `activation ${number(node.activation)}` : node.kind === "logit" ? `p = ${percent(node.probability)}` : node.kind;
  return html`<div class="tip" style=${{ left: `${Math.max(4, Math.min(x + 12, width - 240))}px`, top: `${y + radius(node) + 8}px` }}>
    <b>${nodeName(model, kept, i)}</b><br />${nodePlace(model, i)} · ${amount} · influence ${number(node.influence, 2)}</div>`;
}

// The prompt below the graph, in step with its columns; text leans where columns are narrow.
function Tokens({ model, at, zoom, chosen, act, onToken }) {
  const masked = new Map(model.masked.map((one) => [one.position, one.reason]));
  const narrow = at.columns.some((column, p) => column.width * zoom.k < LETTER * Math.min(14, token(model.tokens[p]).length) + 4);
  const dense = narrow && at.columns.some((column) => column.width * zoom.k < 15);
  return html`<div class=${`tokens${narrow ? " leaning" : ""}${dense ? " dense" : ""}`}>
    ${model.tokens.map((text, position) => {
      const x = at.columns[position].middle * zoom.k + zoom.x;
      if (x < 30 || x > at.width + 20) return null;
      const i = model.byKey.get(`E/${position}`) ?? -1;
      const reason = masked.get(position);
      const says = `token ${position} “${token(text)}”${reason ? `: left to the model (${reason})` : ""}${onToken ? "; shift-click traces it" : ""}`;
      return html`<button key=${position} class=${["tok", reason && "masked", i === chosen && i >= 0 && "on"].filter(Boolean).join(" ")}
        style=${{ left: `${x.toFixed(1)}px`, maxWidth: narrow ? "110px" : `${Math.max(24, at.columns[position].width * zoom.k - 2)}px` }} title=${says} aria-label=${says}
        onClick=${(event) => (event.shiftKey && onToken ? onToken(position) : act.choose(i === chosen ? -1 : i))}>${token(text)}</button>`;
    })}
  </div>`;
}
