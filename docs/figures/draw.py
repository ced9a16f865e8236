"""Draw the pages' own figures: `python docs/figures/draw.py` writes passes.svg and step_time.svg.

passes.svg     the passes of one guided step over the feature map A, in the order of the launches
step_time.svg  a training step of ResNet-50 with each head, from the H100's rows in bench/results
"""

import csv
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "bench" / "results"
INK, GREY, PAPER = "#1b1f24", "#5b6470", "#ffffff"
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"


def text(x: float, y: float, words: str, size: int = 13, **style: str) -> str:
    style = {"fill": INK, "text-anchor": "middle"} | {k.replace("_", "-"): v for k, v in style.items()}
    given = " ".join(f'{name}="{value}"' for name, value in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {given}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str, width: float = 2) -> str:
    return (
        f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="{width:g}" '
        f'marker-end="url(#{colour[1:]})"/>'
    )


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    heads = "".join(
        f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="{c}"/></marker>'
        for c in (BLUE, ORANGE, GREEN, GREY)
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(title)}</title>",
        f"<defs>{heads}</defs>",
        box(0, 0, width, height, PAPER),
        *parts,
        "</svg>\n",
    ])  # fmt: skip


PASSES = (  # kernel, what it computes of A, what small kernels make of that
    ("spatial_sum", "g = mean of A", "S = softmax(MLP(g))"),
    ("channel_sum", "U = sum of S A", "T = softmax(U)"),
    ("spatial_sum", "z = mean of \u03ba T A", "logits, loss, v, dz"),
    ("channel_sum", "dT: sum of v A, dz A", "dU from dT and T"),
    ("spatial_sum", "dS: sum of dU A", "\u03b2, guidance, dg"),
    ("features_grad", "dA from small factors", ""),
)
PHASES = ((0, 3, BLUE, "Forward: three reads"), (3, 5, ORANGE, "Both gradients: two reads"),
          (5, 6, GREEN, "One write"))  # fmt: skip


def passes() -> str:
    left, step, half = 20, 172, 76
    centre = [left + 8 + half + i * step for i in range(len(PASSES))]
    parts = [
        box(left, 64, 5 * step - 8, 44, "#dbe9f4", BLUE),
        text(left + 2.5 * step, 83, "A: the feature map (N, C, H, W), the only large tensor that is kept", 15,
             font_weight="bold"),
        text(left + 2.5 * step, 101, "in GPU memory", 12, fill=GREY),
        box(centre[5] - half, 64, 2 * half, 44, "#d9f0e8", GREEN),
        text(centre[5], 83, "dA", 15, font_weight="bold"),
        text(centre[5], 101, "in GPU memory", 12, fill=GREY),
    ]  # fmt: skip
    for first, end, colour, words in PHASES:
        parts.append(text((centre[first] + centre[end - 1]) / 2, 34, words, 15, fill=colour,
                          font_weight="bold"))  # fmt: skip
        x, right = centre[first] - half, centre[end - 1] + half
        parts.append(f'<line x1="{x}" y1="46" x2="{right}" y2="46" stroke="{colour}" stroke-width="3"/>')
        for i in range(first, end):
            kernel, equation, small = PASSES[i]
            x = centre[i]
            down = (108, 164) if end < 6 else (166, 111)
            parts.append(arrow(x, down[0], x, down[1], colour, 4))
            word = f"read {i + 1}" if end < 6 else "write"
            parts.append(text(x + 8, 142, word, 12, fill=colour, text_anchor="start"))
            parts += [box(x - half, 167, 2 * half, 50, PAPER, colour),
                      text(x, 188, kernel, 14, font_weight="bold"), text(x, 206, equation, 12)]  # fmt: skip
            if small:
                parts += [arrow(x, 217, x, 247, GREY), box(x - half, 250, 2 * half, 34, "#f1f3f5"),
                          text(x, 272, small, 13)]  # fmt: skip
                across = centre[i + 1]
                parts.append(
                    f'<path d="M{x + half} 267 H{across - half - 2} V230 H{across - half + 14} V217" '
                    f'fill="none" stroke="{GREY}" stroke-width="1.5" marker-end="url(#{GREY[1:]})"/>'
                )
    parts.append(text(left, 312, "Grey boxes: tensors of at most N x C or N x H x W numbers, made by small "
                      "kernels between the passes.", 13, fill=GREY, text_anchor="start"))  # fmt: skip
    parts.append(text(left, 332, "One read serves two gradients: v leads to Grad-CAM's weights \u03b2, "
                      "dz to the loss's gradient dA. dA is written from small factors; A is not read for it.",
                      13, fill=GREY, text_anchor="start"))  # fmt: skip
    return svg(1060, 348, "The passes of a guided step over the feature map", parts)


HEADS = {  # provider in the rows: name, colour
    "linear": ("pooling and a linear layer", GREY),
    "fused_compiled": ("this head, compiled", BLUE),
    "fused": ("this head", BLUE),
    "authors": ("the authors' way, two backward passes", ORANGE),
}


def step_times() -> dict[str, float]:
    """Milliseconds of a whole step by provider."""
    (path,) = RESULTS.glob("NVIDIA_H100*.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["pass"] == "e2e" and row["timing"] == "hot"]
    return {row["provider"]: float(row["p50"]) / 1000 for row in rows}


def step_time() -> str:
    times = step_times()
    parts = [text(24, 34, "One training step of ResNet-50, 32 images of 448 x 448, NVIDIA H100", 17,
                  text_anchor="start", font_weight="bold")]  # fmt: skip
    for i, (provider, (name, colour)) in enumerate(HEADS.items()):
        y, time = 54 + 38 * i, times[provider]
        ratio = f" ({time / times['linear']:.2f} x)" if provider != "linear" else ""
        parts += [
            text(328, y + 19, name, 15, text_anchor="end"),
            box(340, y, 7 * time, 28, colour),
            text(350 + 7 * time, y + 19, f"{time:.1f} ms{ratio}", 15, text_anchor="start"),
        ]
    return svg(900, 214, "Time of a training step with each head", parts)


FIGURES = {"passes.svg": passes, "step_time.svg": step_time}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (HERE / name).write_text(draw())
