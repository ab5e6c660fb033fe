"""Tables, notices and pages as one self-contained HTML file, in the reader's light or dark colours.

Everything that comes from data is escaped here, so callers pass plain text.
"""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --line: #d9dee7; --paper: #ffffff;
  --panel: #f6f7fa; --c0: #2563eb; --c1: #d9480f; --c2: #2b8a3e; --c3: #9c36b5; --c4: #0b7285; --c5: #c2255c;
  --c6: #846358; --c7: #495057; --good: #2b8a3e; --bad: #c92a2a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --line: #343b49; --paper: #14171e;
  --panel: #1c212b; --c0: #74a7ff; --c1: #ff9f5a; --c2: #69db7c; --c3: #da9cf0; --c4: #66d9e8; --c5: #faa2c1;
  --c6: #c9ab9c; --c7: #adb5bd; --good: #69db7c; --bad: #ff8787; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 36px 0 8px; }
p.lead { color: var(--soft); margin: 0 0 18px; max-width: 75ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 18px; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; padding: 4px 6px 2px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
th[data-sort] { cursor: pointer; } th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
.notice { border-left: 4px solid var(--c1); background: var(--panel); padding: 8px 14px;
  margin: 8px 0; border-radius: 4px; }
.notice.good { border-color: var(--good); } code { font-size: 13px; }
details { margin: 8px 0; } summary { cursor: pointer; }
svg text { fill: var(--ink); font-size: 12px; } svg .soft { fill: var(--soft); } svg .axis { stroke: var(--line); }
"""

SORT_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.dataset.sort = ''; head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute('aria-sort') !== 'ascending';
      heads.forEach(h => h.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => { const c = row.cells[column]; const v = c.dataset.value ?? c.textContent;
        return v === '' || isNaN(v) ? v : Number(v); };
      [...table.tBodies[0].rows].sort((a, b) => { const x = key(a), y = key(b);
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); }).forEach(r => table.tBodies[0].append(r));
    };
    head.addEventListener('click', sort);
    head.addEventListener('keydown', e => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); sort(); } });
  });
}
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]], sortable: bool = False, digits: int = 4) -> str:
    """Rows as an HTML table; numbers are rounded for show and keep their value for sorting; None shows as a dash."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(_cell(value, digits) for value in row)}</tr>" for row in rows)
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, float):
        return f'<td data-value="{value!r}">{value:.{digits}g}</td>'
    return f"<td>{escape(str(value))}</td>"


def notice(text: str, good: bool = False) -> str:
    """One sentence that must not be overlooked."""
    return f'<p class="notice{" good" if good else ""}">{escape(text)}</p>'


def grid(figures: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="grid">{"".join(figures)}</div>'


def page(title: str, lead: str, body: str) -> str:
    """One HTML file that needs nothing else: no network, no script from elsewhere."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{body}'
        f"<script>{SORT_SCRIPT}</script></body></html>"
    )
