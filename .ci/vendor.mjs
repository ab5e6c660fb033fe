// For developers: fetches the browser's libraries at the versions below through npm, makes one ES module of each group, and
// writes what they are to vendor.json (packages, licences, SHA-256). Users never run it; tests/circuit/viewer/test_vendor.py
// holds the files to their hashes. Run it from the repository's root: node .ci/vendor.mjs
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const OUT = "circuit/viewer/static/vendor", TESTS = "tests/circuit/viewer";
const PACKAGES = {
  preact: "10.29.8", "@preact/signals": "2.11.4", htm: "3.1.1",
  "d3-selection": "3.0.0", "d3-zoom": "3.0.0", "d3-drag": "3.0.0", "@dagrejs/dagre": "1.1.8",
  "axe-core": "4.10.3",
};
const BUNDLER = { esbuild: "0.25.5" };
const GROUPS = {
  "preact.js": `import { h, render } from "preact"; import htm from "htm";
    export { render, h, Fragment, createRef } from "preact";
    export { useEffect, useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
    export { signal, computed, effect, batch, untracked, useSignal, useComputed, useSignalEffect } from "@preact/signals";
    export const html = htm.bind(h);`,
  "d3.js": `export { select, pointer } from "d3-selection"; export { zoom, zoomIdentity, zoomTransform } from "d3-zoom";
    export { drag } from "d3-drag";`,
  "dagre.js": `import dagre from "@dagrejs/dagre"; export default dagre;`,
};

const work = mkdtempSync(join(tmpdir(), "vendor-"));
writeFileSync(join(work, "package.json"), JSON.stringify({ private: true, dependencies: { ...PACKAGES, ...BUNDLER } }));
execFileSync("npm", ["install", "--ignore-scripts", "--no-audit", "--no-fund"], { cwd: work, stdio: "inherit" });
mkdirSync(OUT, { recursive: true });
mkdirSync(TESTS, { recursive: true });

const about = (name) => JSON.parse(readFileSync(join(work, "node_modules", name, "package.json"), "utf8"));
const hash = (path) => createHash("sha256").update(readFileSync(path)).digest("hex");
const listed = {};
const list = (path, names) => {
  listed[path] = {
    sha256: hash(path),
    packages: names.sort().map((name) => ({ name, version: about(name).version, license: about(name).license })),
  };
};

for (const [file, source] of Object.entries(GROUPS)) {
  writeFileSync(join(work, file), source);
  execFileSync(join(work, "node_modules/.bin/esbuild"), [
    file, "--bundle", "--format=esm", "--minify", "--legal-comments=none", "--target=es2022",
    `--outfile=out/${file}`, "--metafile=meta.json",
  ], { cwd: work, stdio: "inherit" });
  copyFileSync(join(work, "out", file), join(OUT, file));
  const inputs = Object.keys(JSON.parse(readFileSync(join(work, "meta.json"), "utf8")).inputs);
  const names = inputs.map((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]).filter(Boolean);
  list(join(OUT, file), [...new Set(names)]);
}
copyFileSync(join(work, "node_modules/axe-core/axe.min.js"), join(TESTS, "axe.min.js"));
list(join(TESTS, "axe.min.js"), ["axe-core"]);

// The licences of everything that users are given, as each package states it.
const given = new Set(Object.entries(listed).filter(([path]) => path.startsWith(OUT)).flatMap(([, one]) => one.packages.map((p) => p.name)));
const texts = [...given].sort().map((name) => {
  const folder = join(work, "node_modules", name);
  const file = readdirSync(folder).find((one) => /^licen[cs]e/i.test(one));
  return `${name} ${about(name).version}\n\n${file ? readFileSync(join(folder, file), "utf8").trim() : about(name).license}\n`;
});
writeFileSync(join(OUT, "LICENSES.txt"), texts.join(`\n${"-".repeat(80)}\n\n`));
writeFileSync(join(OUT, "vendor.json"), `${JSON.stringify(listed, null, 1)}\n`);
rmSync(work, { recursive: true });
