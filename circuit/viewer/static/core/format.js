// How tokens, numbers and nodes read.

export function token(text) {
  const bare = text.startsWith(" ") && text.trim() ? text.slice(1) : text;
  return bare.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(/^ +$/g, "␣") || "∅";
}

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

export function percent(share) {
  if (share === null || share === undefined || Number.isNaN(share)) return "–";
  const value = 100 * share;
  if (value !== 0 && Math.abs(value) < 0.1) return value > 0 ? "<0.1%" : ">−0.1%";
  return `${value >= 10 || value === 0 ? Math.round(value) : Number(value.toPrecision(2))}%`;
}

export const shorten = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

export const bareLabel = (label) => label.replace(/ \(F1 [\d.]+\)$/, "");

const SOURCES = { truth: "ground truth", tokens: "its tokens", hand: "a person" };
export const labelSource = (source) => SOURCES[source] ?? source;

// What a node is called: a hand label of this page first.
export function nodeName(model, kept, i) {
  const node = model.nodes[i];
  if (node.kind === "embedding") return `“${token(model.tokens[node.position])}”`;
  if (node.kind === "logit") return `says “${token(node.label)}”`;
  if (node.kind === "feature") {
    return kept?.labels[`${node.layer}/${node.index}`] ?? (bareLabel(node.label) || `feature ${node.index}`);
  }
  return { error: "error", bias: "bias", position: "position", kept: "left to the model" }[node.kind] ?? node.kind;
}

export function nodePlace(model, i) {
  const node = model.nodes[i];
  const at = `${node.position} “${token(model.tokens[node.position] ?? "")}”`;
  return node.layer >= 0 && node.kind !== "logit" ? `L${node.layer} · ${at}` : at;
}

export function count(amount, one, many = `${one}s`) {
  return `${amount.toLocaleString("en")} ${amount === 1 ? one : many}`;
}
