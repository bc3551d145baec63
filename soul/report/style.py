"""The style sheet of a page: a narrow column, readable on a phone, in the light and in the dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1f2328; --faint: #5b636d; --line: #dfe2e6;
  --good: #17703a; --mixed: #8a5a00; --bad: #b3261e; --open: #3d5a80;
  --series-0: #c2410c; --series-1: #1d5fc4; --series-2: #0f766e; --series-3: #8b3fc0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1c2026; --ink: #e4e7eb; --faint: #a2abb6; --line: #343b44;
    --good: #57c98a; --mixed: #e0ad4c; --bad: #f28b82; --open: #8fb4e0;
    --series-0: #f7934f; --series-1: #6ea8fe; --series-2: #3fc7b4; --series-3: #c99bf0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; padding: 1.5rem max(1rem, env(safe-area-inset-left)) 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main, header, footer { max-width: 60rem; margin: 0 auto; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p { margin: 0 0 .75rem; }
ul { padding-left: 1.25rem; }
p, li, h2, h3 { overflow-wrap: anywhere; }
.subtitle, .note, figcaption, footer { color: var(--faint); }
.subtitle { margin: .25rem 0 1.25rem; overflow-wrap: anywhere; }
section, details { margin-top: 2.25rem; }
details { border-top: 1px solid var(--line); padding-top: .75rem; margin-top: 1rem; }
details + section { margin-top: 2.25rem; }
summary { cursor: pointer; padding: .25rem 0; }
summary h2 { display: inline; margin: 0; font-size: 1.05rem; }
details[open] summary { margin-bottom: .75rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-left: .4rem solid; border-radius: .5rem;
  padding: 1rem 1.15rem; }
.verdict .headline { font-size: 1.2rem; line-height: 1.35; font-weight: 650; margin: 0; }
.verdict p + p { margin: .5rem 0 0; color: var(--ink); }
.good { border-left-color: var(--good); } .good .headline { color: var(--good); }
.mixed { border-left-color: var(--mixed); } .mixed .headline { color: var(--mixed); }
.bad { border-left-color: var(--bad); } .bad .headline { color: var(--bad); }
.open { border-left-color: var(--open); } .open .headline { color: var(--open); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.25rem, 1fr)); gap: .75rem; margin: 1rem 0 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .65rem .8rem; }
.figures dt { font-size: .85rem; color: var(--faint); }
.figures dd { margin: 0; overflow-wrap: anywhere; }
.figures .value { font-size: 1.1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures .note { font-size: .85rem; }
.charts { margin: 0 0 1rem; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem; }
figure { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: 0;
  min-width: 0; }
figure h3 { margin: 0 0 .15rem; }
figure svg { display: block; width: 100%; height: auto; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #ffffff; border-radius: .25rem; }
figure.scroll img { min-width: 34rem; }
figcaption { font-size: .85rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; margin: 0 0 .35rem; padding: 0; list-style: none; }
.legend li::before { content: ""; display: inline-block; width: 1.1em; vertical-align: .28em; margin-right: .4em;
  border-top: 3px solid currentColor; }
.legend li.level::before { border-top-style: dashed; border-top-width: 2px; }
.legend span { color: var(--ink); }
.scroll { overflow-x: auto; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; color: var(--faint); }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; white-space: nowrap; }
.pairs { width: 100%; table-layout: fixed; margin: 0 0 1rem; }
.pairs th { width: 38%; overflow-wrap: anywhere; font-weight: 400; }
.pairs td { overflow-wrap: anywhere; white-space: pre-wrap; padding-right: 0; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem .9rem;
  margin: 0 0 .75rem; }
.sample .prompt { font-weight: 600; }
.sample .expected { margin-top: .15rem; color: var(--faint); font-size: .9rem; }
.sample .text { white-space: pre-wrap; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: .6rem 1.25rem;
  margin: .6rem 0 0; }
.answers div { border-left: .2rem solid var(--line); padding-left: .7rem; min-width: 0; }
.answers dt { font-size: .85rem; color: var(--faint); }
.answers dd { margin: 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; font-size: .88rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .65rem .8rem; margin: 0 0 1rem;
  overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 3rem; font-size: .85rem; }
@media print { body { background: none; } section, figure, .sample { break-inside: avoid; } }
"""
