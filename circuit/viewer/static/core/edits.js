// Edits of what is kept beside a graph: tables of small entries. A change names entries; null takes one away.

export const SECTIONS = ["pins", "members", "groups", "notes", "labels", "places"];
export const nothing = () => ({ revision: 0, ...Object.fromEntries(SECTIONS.map((name) => [name, {}])) });

export function apply(kept, changes) {
  const after = { ...kept };
  for (const [section, entries] of Object.entries(changes)) {
    const table = { ...after[section] };
    for (const [key, value] of Object.entries(entries)) {
      if (value === null) delete table[key];
      else table[key] = value;
    }
    after[section] = table;
  }
  return after;
}

// The change that takes another back: each entry gets the value it has now.
export function inverse(kept, changes) {
  return Object.fromEntries(Object.entries(changes).map(([section, entries]) => [
    section,
    Object.fromEntries(Object.keys(entries).map((key) => [key, kept[section][key] ?? null])),
  ]));
}

export function merge(...all) {
  const both = {};
  for (const changes of all) {
    for (const [section, entries] of Object.entries(changes)) both[section] = { ...both[section], ...entries };
  }
  return both;
}

export const pin = (keys, on = true) => ({ pins: Object.fromEntries(keys.map((key) => [key, on ? true : null])) });

export function group(id, name, keys) {
  return merge(pin(keys), { groups: { [id]: name }, members: Object.fromEntries(keys.map((key) => [key, id])) });
}

export function ungroup(kept, id) {
  const members = Object.keys(kept.members).filter((key) => kept.members[key] === id);
  return { groups: { [id]: null }, places: { [id]: null }, members: Object.fromEntries(members.map((key) => [key, null])) };
}

export function unpin(kept, keys) {
  const own = keys.filter((key) => key in kept.pins || key in kept.members);
  const left = (id) => Object.keys(kept.members).some((key) => kept.members[key] === id && !own.includes(key));
  const emptied = [...new Set(own.map((key) => kept.members[key]).filter((id) => id && !left(id)))];
  return {
    ...pin(own, false),
    members: Object.fromEntries(own.filter((key) => key in kept.members).map((key) => [key, null])),
    groups: Object.fromEntries(emptied.map((id) => [id, null])),
    places: Object.fromEntries([...own, ...emptied].filter((key) => key in kept.places).map((key) => [key, null])),
  };
}

export function clear(kept) {
  return Object.fromEntries(["pins", "members", "groups", "places"].map((section) => [
    section, Object.fromEntries(Object.keys(kept[section]).map((key) => [key, null])),
  ]));
}

export const isEmpty = (changes) => Object.values(changes).every((entries) => Object.keys(entries).length === 0);

// Of a step back: the entries that are still as this page made them. What another page has changed since stays as it is.
export function untouched(kept, changes, made) {
  const same = (a, b) => JSON.stringify(a ?? null) === JSON.stringify(b ?? null);
  return Object.fromEntries(Object.entries(changes).map(([section, entries]) => [
    section, Object.fromEntries(Object.entries(entries).filter(([key]) => same(kept[section][key], made[section]?.[key]))),
  ]));
}

// Steps that can be taken back, and taken again.
export function remember(history, change, back, name) {
  return { past: [...history.past.slice(-199), { change, back, name }], future: [] };
}

export function stepBack(history) {
  const step = history.past.at(-1);
  return step && { changes: step.back, made: step.change, name: step.name, history: { past: history.past.slice(0, -1), future: [step, ...history.future] } };
}

export function stepForward(history) {
  const [step, ...future] = history.future;
  return step && { changes: step.change, made: step.back, name: step.name, history: { past: [...history.past, step], future } };
}
