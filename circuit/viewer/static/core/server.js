// Questions to the server. A page that was saved to disk carries its answers with it, in `crosslace-data`.

const carried = document.getElementById("crosslace-data");
export const fixed = carried ? JSON.parse(carried.textContent) : null;

export async function ask(path, parameters) {
  if (fixed) return fromPage(path, parameters);
  return answered(await fetch(`/api/${path}?${new URLSearchParams(parameters)}`));
}

export async function send(path, body) {
  if (fixed) return null;
  return answered(await fetch(`/api/${path}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) }));
}

async function answered(response) {
  const text = await response.text();
  let answer = null;
  try { answer = JSON.parse(text); } catch { /* said below */ }
  if (!response.ok || answer === null) throw new Error(answer?.error ?? `the server answered ${response.status}`);
  return answer;
}

function fromPage(path, parameters) {
  if (path === "graph") return fixed.graph;
  const record = path === "feature" && fixed.features[`${parameters.layer}/${parameters.feature}`];
  if (record) return record;
  throw new Error(path === "feature" ? "this page carries no dashboard of the feature" : "this page is a saved copy");
}
