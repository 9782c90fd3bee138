"""The style sheet of the page: light and dark, narrow and wide, on screen and on paper."""

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #c4c4c0;
  --soft: #f4f4f2; --warn: #8a3b12; --link: #1b4f8a; --alarm: #a40e0e; --quiet: #55554f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #171717; --line: #4a4a4a;
  --soft: #242424; --warn: #ffb38a; --link: #8ab8f0; --alarm: #ff9a9a; --quiet: #b4b4ae; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: .8rem 1.25rem 4rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: .7rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, li, figcaption, caption { max-width: 52rem; }
a { color: var(--link); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link);
  outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
.banner { border-left: 5px solid var(--warn); padding: .3rem .8rem; margin: .4rem 0;
  font-size: .9rem; max-width: none; background: var(--soft); }
.banner strong { color: var(--warn); }
.alarm { border: 4px solid var(--alarm); padding: .6rem 1rem; margin: .8rem 0; }
.alarm h3, .alarm strong { color: var(--alarm); }
.answer { font-size: 1.15rem; font-weight: 600; margin: .3rem 0 .7rem; }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
.card { background: var(--soft); border-left: 5px solid var(--ink); padding: .5rem .9rem;
  font-size: .93rem; break-inside: avoid; }
.card h3 { margin: 0 0 .2rem; } .card p { margin: .25rem 0; }
.card.open { border-left-color: var(--warn); }
.kind { font-weight: 600; } .quiet { color: var(--quiet); font-size: .9rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; padding: 0;
  margin: .3rem 0; font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; max-width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0 .4rem; position: sticky; left: 0;
  max-width: 88vw; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; unicode-bidi: isolate; overflow-wrap: normal; }
thead th { font-weight: 600; background: var(--soft); max-width: 10rem; min-width: 4rem; }
tbody th { font-weight: 600; text-align: left; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child { text-align: left; }
.text td, .text th { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.text tbody th { min-width: 8rem; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 52rem; height: auto; background: #fff; }
figcaption { font-size: .9rem; }
summary { cursor: pointer; padding: .3rem 0; font-weight: 600; }
@media (max-width: 44rem) { body { padding: .6rem .8rem 3rem; }
  figure img { width: 42rem; max-width: none; } }
@page { size: A4; margin: 13mm; }
@page wide { size: A4 landscape; margin: 10mm; }
@media print {
  :root { --ink: #000; --paper: #fff; --line: #999; --soft: #fff; --warn: #8a3b12;
    --link: #000; --alarm: #a40e0e; --quiet: #333; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip { display: none; }
  .scroll { overflow: visible; } .wide { page: wide; }
  table { width: 100%; font-size: 7.5pt; } .wide table { font-size: 6.5pt; }
  th, td { padding: 1.5pt 2.5pt; white-space: normal !important; overflow-wrap: anywhere;
    min-width: 0 !important; }
  thead { display: table-header-group; } tr, .banner, .alarm { break-inside: avoid; }
  caption { position: static; } h2, h3, summary { break-after: avoid; }
  figure img { width: 100%; max-width: 100%; max-height: 22cm; object-fit: contain; }
}
"""
