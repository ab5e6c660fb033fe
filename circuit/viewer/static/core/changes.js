// What is changed when steering, as text in the address: `1/7/310*-2` multiplies a feature, `1/7/311=5.2~California`
// switches one on that is silent here; and which head's look is asked about.

export function parseChanges(text) {
  const found = {};
  for (const part of text.split(";")) {
    const [, key, sign, amount, label] = part.match(/^(\d+\/\d+\/\d+)([*=])(-?[\d.]+(?:e-?\d+)?)(?:~(.*))?$/) ?? [];
    if (!key || !Number.isFinite(Number(amount))) continue;
    found[key] = sign === "*" ? Number(amount) : { value: Number(amount), label: label ?? "" };
  }
  return found;
}

export function formatChanges(changes) {
  return Object.entries(changes).map(([key, change]) => (typeof change === "number" ? `${key}*${change}` : `${key}=${change.value}~${change.label.replaceAll(";", ",")}`)).join(";");
}

// `0/3@10` asks from a token, `0/3@logit/10/7<1/7/310` from where most of an edge went through the head.
export function parseLook(text) {
  const [, layer, head, query, target, source] = text.match(/^(\d+)\/(\d+)@(?:(\d+)|([^<]+)<(.+))$/) ?? [];
  if (layer === undefined) return null;
  return { layer: Number(layer), head: Number(head), ...(query === undefined ? { target, source } : { query: Number(query) }) };
}

export const formatLook = ({ layer, head, query, target, source }) => `${layer}/${head}@${query === undefined ? `${target}<${source}` : query}`;
