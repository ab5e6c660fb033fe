// A stand-in for a canvas that writes down what is painted as SVG: the same picture, sharp at any size.

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]).replace(/[\u0000-\u0008\u000b-\u001f]/g, "\ufffd");
const short = (value) => Number(value.toFixed(1));

export class Recorder {
  constructor(width, height, measure) {
    Object.assign(this, { width, height, measure, parts: [], path: "", globalAlpha: 1, lineWidth: 1, dash: [], font: "12px sans-serif", textAlign: "left", fillStyle: "#000", strokeStyle: "#000" });
  }
  beginPath() { this.path = ""; }
  moveTo(x, y) { this.path += `M${short(x)} ${short(y)}`; }
  lineTo(x, y) { this.path += `L${short(x)} ${short(y)}`; }
  closePath() { this.path += "Z"; }
  bezierCurveTo(a, b, c, d, e, f) { this.path += `C${[a, b, c, d, e, f].map(short).join(" ")}`; }
  arc(x, y, r) { this.path += `M${short(x - r)} ${short(y)}a${short(r)} ${short(r)} 0 1 0 ${short(2 * r)} 0a${short(r)} ${short(r)} 0 1 0 ${short(-2 * r)} 0Z`; }
  roundRect(x, y, w, h, r) {
    this.path += `M${short(x + r)} ${short(y)}h${short(w - 2 * r)}q${r} 0 ${r} ${r}v${short(h - 2 * r)}q0 ${r} ${-r} ${r}h${short(2 * r - w)}q${-r} 0 ${-r} ${-r}v${short(2 * r - h)}q0 ${-r} ${r} ${-r}Z`;
  }
  setLineDash(dash) { this.dash = dash; }
  clearRect() {}
  fillRect(x, y, w, h) { this.parts.push(`<rect x="${short(x)}" y="${short(y)}" width="${short(w)}" height="${short(h)}" fill="${this.fillStyle}" fill-opacity="${this.globalAlpha}"/>`); }
  fill() { this.parts.push(`<path d="${this.path}" fill="${this.fillStyle}" fill-opacity="${this.globalAlpha}"/>`); }
  stroke() {
    const dash = this.dash.length ? ` stroke-dasharray="${this.dash.join(" ")}"` : "";
    this.parts.push(`<path d="${this.path}" fill="none" stroke="${this.strokeStyle}" stroke-width="${short(this.lineWidth)}" stroke-opacity="${Number(this.globalAlpha.toFixed(2))}"${dash}/>`);
  }
  measureText(text) { return this.measure(text, this.font); }
  save() {}
  restore() {}
  rotatedText(text, x, y, degrees) { this.text(text, x, y, ` transform="rotate(${degrees} ${short(x)} ${short(y)})"`); }
  fillText(text, x, y) { this.text(text, x, y, ""); }
  text(text, x, y, more) {
    const [, weight = "", size] = this.font.match(/^(\d{3} )?([\d.]+)px/) ?? [null, "", "12"];
    const anchor = { center: "middle", right: "end" }[this.textAlign] ?? "start";
    this.parts.push(`<text x="${short(x)}" y="${short(y)}" font-size="${size}"${weight ? ` font-weight="${weight.trim()}"` : ""} text-anchor="${anchor}" dominant-baseline="central" fill="${this.fillStyle}"${more}>${escape(text)}</text>`);
  }
  svg(title) {
    return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${this.width} ${this.height}" width="${this.width}" height="${this.height}" font-family="sans-serif" role="img" aria-label="${escape(title)}">\n${this.parts.join("\n")}\n</svg>`;
  }
}
