// The page's whole state is in its address, after #: a page, then names and values. What is at its default is left out.

export const DEFAULTS = {
  run: "", slug: "", share: "", links: "400", errors: "", biases: "", q: "", node: "", side: "node", zoom: "",
  picked: "", with: "", withrun: "", withstep: "", edge: "", look: "", changes: "", mode: "steer", write: "12", layer: "0", feature: "0", prompt: "", theme: "", big: "", step: "",
};

export function parse(hash) {
  const [page, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const given = Object.fromEntries(new URLSearchParams(query));
  const known = Object.fromEntries(Object.entries(given).filter(([name]) => Object.hasOwn(DEFAULTS, name)));
  return { page, ...DEFAULTS, ...known };
}

export function format(route) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(route)) {
    if (name !== "page" && value !== DEFAULTS[name] && value !== undefined) query.set(name, value);
  }
  const text = query.toString();
  return `#/${route.page}${text ? `?${text}` : ""}`;
}

export const address = (page, parameters) => format({ page, ...parameters });
