"""Write docs/design/step.svg: one step of one matrix, in the order in which things happen. `python docs/picture.py`.

Black on white, told apart by outline alone: thick is kept from step to step, thin lives within a step.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 880, 500
OUT = Path(__file__).resolve().parent / "design" / "step.svg"

# Left, top, width, height, lines of text, whether it is kept from step to step.
BOXES = {
    "grad": (20, 70, 150, 60, ["gradient g", "fp32, bf16 or fp16"], False),
    "state": (20, 190, 150, 80, ["codes, scales", "8 bits an element,", "fp32 a block"], True),
    "stats": (230, 70, 190, 80, ["phase 1: stats", "decode, add g; max, sum of", "squares, finite? of m and u"], False),
    "finite": (480, 70, 170, 80, ["all gradients finite?", "of all groups and ranks", "no: nothing is written"], False),
    "apply": (230, 190, 190, 80, ["phase 2: apply", "the same m again;", "encode it, hand on u"], False),
    "input": (480, 190, 170, 80, ["u / |u|", "exact, not the", "encoded momentum"], False),
    "ns": (480, 320, 170, 80, ["Newton-Schulz", "5 times: A = XX\u1d40", "X = aX + (bA + cA\u00b2) X"], False),
    "update": (230, 320, 190, 80, ["update", "W = (1 - lr wd) W - lr r O", "in fp32, rounded once"], False),
    "param": (20, 320, 150, 80, ["parameter W", "fp32, bf16 or fp16"], True),
    "adamw": (700, 190, 160, 80, ["AdamW", "embeddings, head,", "norms, biases"], False),
}
# Start, end, label.
ARROWS = [
    ((170, 100), (230, 100), ""),
    ((170, 215), (230, 130), ""),
    ((420, 110), (480, 110), ""),
    ((480, 140), (420, 205), "yes"),
    ((170, 245), (230, 245), ""),
    ((230, 258), (170, 258), ""),
    ((420, 230), (480, 230), ""),
    ((565, 270), (565, 320), ""),
    ((480, 360), (420, 360), "O"),
    ((230, 370), (170, 370), ""),
    ((170, 350), (230, 350), ""),
    ((650, 120), (760, 190), "yes"),
]


def _box(left: int, top: int, width: int, height: int, lines: list[str], is_kept: bool) -> list[str]:
    stroke = 3 if is_kept else 1
    shape = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="#fff" stroke="#000"'
    parts = [f'{shape} stroke-width="{stroke}"/>']
    first = top + height / 2 - 8 * (len(lines) - 1) + 5
    for index, line in enumerate(lines):
        weight = ' font-weight="bold"' if index == 0 else ""
        place = f'x="{left + width / 2:g}" y="{first + 16 * index:g}"'
        parts.append(f'<text {place} text-anchor="middle"{weight}>{escape(line)}</text>')
    return parts


def _arrow(start: tuple[int, int], end: tuple[int, int], label: str) -> list[str]:
    (x1, y1), (x2, y2) = start, end
    parts = [f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#000" marker-end="url(#tip)"/>']
    if label:
        parts.append(f'<text x="{(x1 + x2) / 2 + 8:g}" y="{(y1 + y2) / 2 - 4:g}">{escape(label)}</text>')
    return parts


def picture() -> str:
    """Return the SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12" role="img" aria-labelledby="title">',
        '<title id="title">One step of one matrix: statistics, check, momentum, Newton-Schulz, update</title>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        '<text x="20" y="35" font-size="16" font-weight="bold">One step of one matrix</text>',
    ]
    for start, end, label in ARROWS:
        lines += _arrow(start, end, label)
    for box in BOXES.values():
        lines += _box(*box)
    notes = [
        "Thick outline: kept from step to step. Thin: lives within the step.",
        "Phase 1 writes nothing. Where any gradient of the model is not finite, phase 2 writes nothing either.",
    ]
    lines += [f'<text x="20" y="{440 + 20 * i}">{escape(note)}</text>' for i, note in enumerate(notes)]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(picture(), encoding="ascii", errors="xmlcharrefreplace")
