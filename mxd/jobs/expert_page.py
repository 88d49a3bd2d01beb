"""The page of `mxd experts`: one HTML file, in which text of a corpus is never markup."""

import html
from collections.abc import Sequence
from typing import Any

from .options import text_name

PAGE_NAME = "experts.html"
ALIGNMENT = "alignment of its direction with what follows its contexts (standard deviations)"
NOT_ACTIVE = "not active in this text"
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "td{vertical-align:top;padding:.1em .6em .1em 0}td:first-child{text-align:right;color:#666}mark{background:#fd6}"
    "code{background:#eee;padding:0 .2em;white-space:pre-wrap}"
)
_HEAD = f'<!doctype html><meta charset="utf-8"><title>Experts</title><style>{_STYLE}</style>'
_INSPECTED = "its most unusual experts: rarity, strength relative to the expert's maximum, share of the layer's output"
_THERE = "promoted by what it adds at this very token (a c * Dᵀz, which depends on the token)"


def expert_page(results: dict[str, Any]) -> str:
    """Return the results of `read_experts` as an HTML page of one file."""
    lines = [_HEAD]
    read = f"{results['settings']['tokens']:,} tokens of {text_name(results['settings']['dataset'])}"
    lines.append(f"<p>Text: {html.escape(read)}</p><p>{html.escape(results.get('warning', ''))}</p>")
    for layer, experts in results["layers"].items():
        lines.append(f"<h1>Layer {html.escape(layer)}</h1>")
        for expert, found in experts.items():
            lines += [*_heading(layer, expert), *_expert(found)]
    return "\n".join([*lines, ""])


def inspection_page(results: dict[str, Any]) -> str:
    """Return the results of `inspect_text` as an HTML page of one file."""
    lines = [_HEAD]
    for text in results["texts"]:
        for layer, row in text["layers"].items():
            lines.append(f"<h1>Layer {html.escape(layer)}</h1><table><tr><th>token</th><th>{_INSPECTED}</th></tr>")
            for token in row["tokens"]:
                cells = [
                    f'<a href="#{html.escape(layer)}-{e["expert"]}">{e["expert"]}</a> {measures(e)}'
                    for e in token["experts"]
                ]
                lines.append(
                    f"<tr><td><code>{html.escape(token['token'])}</code></td><td>{'<br>'.join(cells[:5])}</td></tr>"
                )
            lines.append("</table>")
    for layer, experts in results["experts"].items():
        for expert, found in experts.items():
            lines += [
                *_heading(layer, expert),
                f"<p>{found['score']:.1f} bits, active on {found['texts']} of the texts</p>",
            ]
            lines += _expert(found)
    return "\n".join([*lines, ""])


def measures(row: dict[str, Any]) -> str:
    """Return rarity, relative strength and share of an expert on a token as text."""
    relative = "–" if row["relative"] is None else f"{100 * row['relative']:.0f} %"
    return f"{row['rarity']:.1f} bits, {relative}, {100 * row['share']:.0f} %"


def _heading(layer: str, expert: str) -> list[str]:
    return [
        f'<h2 id="{html.escape(f"{layer}-{expert}")}">Layer {html.escape(layer)}, expert {html.escape(expert)}</h2>'
    ]


def _expert(found: dict[str, Any]) -> list[str]:
    lines = [f"<p>active on {percent(found['frequency'])} % of the tokens</p>"]
    if not found["examples"]:
        return [*lines, f"<p>{NOT_ACTIVE}</p>"]
    if found.get("alignment") is not None:
        lines.append(f"<p>{ALIGNMENT}: {found['alignment']:.1f}</p>")
    for way in ("promoted", "suppressed"):
        if found.get(way):
            tokens = " ".join(f"<code>{html.escape(token)}</code>" for token, _ in found[way])
            lines.append(f"<p>tokens {way} by its direction: {tokens}</p>")
    if shares := [f"{html.escape(name)} {percent(share)} %" for name, share in found.get("domains", {}).items()]:
        lines.append(f"<p>domains: {', '.join(shares)}</p>")
    for name, pairs in found.get("nearest", {}).items():
        others = ", ".join(f"{expert} ({value:.2f})" for expert, value in pairs)
        lines.append(f"<p>nearest by {name}: {others}</p>")
    lines.append(_contexts(found["examples"]))
    if found.get("quantiles"):
        lines += ["<p>evenly spaced over its coefficients:</p>", _contexts(found["quantiles"])]
    return lines


def _contexts(contexts: Sequence[dict[str, Any]]) -> str:
    rows = [
        f"<tr><td>{context['coefficient']:.3g}</td><td>{html.escape(context['before'])}"
        f"<mark>{html.escape(context['token'])}</mark>{html.escape(context['after'])}{_there(context)}</td></tr>"
        for context in contexts
    ]
    return f"<table>{''.join(rows)}</table>"


def _there(context: dict[str, Any]) -> str:
    tokens = " ".join(f"<code>{html.escape(token)}</code>" for token, _ in context.get("promoted", []))
    return f"<br><small>{_THERE}: {tokens}</small>" if tokens else ""


def percent(frequency: float | None) -> str:
    """Return a share as a percentage with two decimals; a dash for None."""
    return "–" if frequency is None else f"{100 * frequency:.2f}"
