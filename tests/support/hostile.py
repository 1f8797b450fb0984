"""Texts that other programs may have as names, log lines and errors, made to break a page."""

from __future__ import annotations

# What a script that ran would leave on the element of the document.
_MARK = "document.documentElement.dataset.taken='yes'"
_ELSEWHERE = "https://evil.example"

CORPUS: tuple[str, ...] = (
    f"<script>{_MARK}</script>",
    f'<img src=x onerror="{_MARK}">',
    f"<img/src={_ELSEWHERE}/pixel.png>",
    f'"><svg/onload={_MARK}>',
    f"'><b/onmouseover={_MARK}>",
    f'" autofocus onfocus="{_MARK}" x="',
    f"' hx-get='{_ELSEWHERE}/' hx-trigger='load' x='",
    f'<div hx-on:htmx:load="{_MARK}" hx-get="/api/tags" hx-trigger="load">',
    f'<hx-partial hx-target="#main"><img src=x onerror="{_MARK}"></hx-partial>',
    f"</script><script>{_MARK}</script>",
    "</title></style></textarea></option></select></template><h1>taken</h1>",
    f"<iframe src=javascript:{_MARK}></iframe>",
    f"<a href=javascript:{_MARK}>x</a>",
    f"javascript:{_MARK}",
    f"[x](javascript:{_MARK}) ![x]({_ELSEWHERE}/x.png)",
    f"<style>@import '{_ELSEWHERE}/x.css';body{{display:none}}</style>",
    f"<meta http-equiv=refresh content=0;url={_ELSEWHERE}>",
    f"<base href={_ELSEWHERE}/>",
    f"<form action={_ELSEWHERE}><button>Sign in</button></form>",
    "{{ 7*7 }}{% raw %}{{ config }}{% endraw %}${7*7}#{7*7}<%= 7*7 %>",
    "&lt;script&gt;&#x3c;b&#x3e;&amp;amp;",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe\u2066\u2069\u200b\u200f\ufeff",
    "a\x00b\x01c\x7f\x85d\ufffd\ufffe",
    "data: x\r\rdata: y\n\nevent: over\ndata: -\n\nid: 1\u2028\u2029\x0b\x0c\x1cend",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 20,
    "Z\u0351\u036b\u0343" * 40,
    "x" * 10_000,
    "wide " * 400,
    "%s %n %00 %0d%0a ../../etc/passwd \\ \\\\ ` $(id) `",
    "__proto__",
    "constructor",
)
# As part of a line of HTTP: no control characters.
IN_HEADERS = tuple(one for one in CORPUS if one.isascii() and one.isprintable() and len(one) < 2000)
# As the name of a model.
AS_NAMES = tuple(one for one in CORPUS if "\x00" not in one)

# What none of these texts may have made.
FOREIGN_ELEMENTS = (
    "[onerror], [onload], [onfocus], [onmouseover], [autofocus][x], iframe, object, embed, base,"
    "img[src='x'],"
    "[src^='https://evil'], [href*='evil.example'], [href^='javascript:' i], [hx-get^='https://evil'],"
    "meta[http-equiv], form[action^='https://evil'], body style, h1 + h1,"
    "body script:not([src^='/ui/static/'])"
)
