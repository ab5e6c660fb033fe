// The search box: words, and filters such as `layer:2 act>3 label~texas token:Dallas kind:error feature:310`.

const NUMBERS = {
  layer: (node) => node.layer, act: (node) => node.activation, activation: (node) => node.activation,
  pos: (node) => node.position, position: (node) => node.position, feature: (node) => node.index, index: (node) => node.index,
  influence: (node) => node.influence, share: (node) => node.share, p: (node) => node.probability ?? NaN,
};
const TEXTS = {
  label: (node, name) => name, token: (node, name, tokens) => tokens[node.position] ?? "", kind: (node) => node.kind,
  note: (node, name, tokens, note) => note,
};
const COMPARE = {
  ":": (a, b) => a === b, "=": (a, b) => a === b, "<": (a, b) => a < b, ">": (a, b) => a > b,
  "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
};

// {test, problem}: what a node must be, or what cannot be understood.
export function parseQuery(text) {
  const parts = [...text.matchAll(/(?:([a-z]+)(<=|>=|[:=<>~])(?:"([^"]*)"|(\S+))|"([^"]*)"|(\S+))/gi)];
  const tests = [];
  for (const [whole, name, sign, quoted, plain, phrase, word] of parts) {
    const found = name ? filter(name.toLowerCase(), sign, quoted ?? plain) : words(phrase ?? word);
    if (typeof found === "string") return { test: () => false, problem: found, whole };
    tests.push(found);
  }
  return { test: (...about) => tests.every((one) => one(...about)), problem: "" };
}

function filter(name, sign, value) {
  if (name in TEXTS) {
    const wanted = value.toLowerCase();
    if (sign === "~") return (...about) => TEXTS[name](...about).toLowerCase().includes(wanted);
    if (sign === ":" || sign === "=") return (...about) => TEXTS[name](...about).trim().toLowerCase() === wanted.trim();
    return `${name} is text: ${name}~${value}, or ${name}:${value}`;
  }
  if (!(name in NUMBERS)) return `there is no filter ${name}; there are ${[...Object.keys(TEXTS), ...Object.keys(NUMBERS)].join(", ")}`;
  const range = value.match(/^(-?[\d.]+)-(-?[\d.]+)$/);
  if (range && sign === ":") return (node) => NUMBERS[name](node) >= Number(range[1]) && NUMBERS[name](node) <= Number(range[2]);
  if (sign === "~" || value === "" || Number.isNaN(Number(value))) return `${name} is a number: ${name}:2, ${name}>2, ${name}:2-5`;
  return (node) => COMPARE[sign](NUMBERS[name](node), Number(value));
}

function words(text) {
  const wanted = text.toLowerCase();
  const whole = /^\d+$/.test(wanted) ? Number(wanted) : null;
  return (node, name, tokens, note) =>
    name.toLowerCase().includes(wanted) || note.toLowerCase().includes(wanted) || (whole !== null && node.index === whole && node.kind === "feature");
}
