"""The tables of docs/adapters.md, computed anew."""

from pathlib import Path

import torch

from krontune.adapters import MokaConfig, MokaLinear
from krontune.adapters.kronecker import a_first

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def rows_under(heading):
    """The cells of the table whose first row begins with `heading`."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return table
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def size(text):
    first, second = text.split(" x ")
    return int(first), int(second)


def multiplications(layer):
    """Of one token: for each product the two matrix products in the order that is taken; and the numbers between."""
    total, between = 0, 0
    for a, b in zip(*layer.stacks("default"), strict=True):
        (k, m_a, n_a), (_, m_b, n_b) = a.shape, b.shape
        first = a_first(m_a, n_a, m_b, n_b)
        left, right = (m_a * n_a * n_b, m_a * n_b * m_b) if first else (n_a * n_b * m_b, m_a * n_a * m_b)
        total += k * (left + right)
        between += k * (m_a * n_b if first else n_a * m_b)
    return total, between


def layer_of(m, n, **options):
    config = MokaConfig(**options)
    return MokaLinear(torch.nn.Linear(n, m, device="meta"), "default", config, r=config.r, alpha=1.0)


def test_the_table_of_single_products():
    table = rows_under("A")
    assert len(table) == 5
    for shape, parameters, rank, count, lora, between in table:
        layer = layer_of(4096, 4096, r=1, shapes=[size(shape)])
        a, b = layer.moka_A["default"][0], layer.moka_B["default"][0]
        assert int(parameters) == a.numel() + b.numel()
        assert int(rank) == min(a.shape[1:]) * min(b.shape[1:])
        assert (int(count), int(between)) == multiplications(layer)
        assert int(lora) == int(count) / (4096 + 4096)


def test_the_table_of_whole_layers():
    table = rows_under("layer")
    assert len(table) == 18
    for where, shapes, r, n_shapes, parameters, equal, share, lora in table:
        m, n = size(where)
        layer = layer_of(m, n, r=int(r), n_shapes=int(n_shapes), shapes=shapes)
        held = sum(p.numel() for name, p in layer.named_parameters() if "moka_" in name)
        count, _ = multiplications(layer)
        assert int(parameters) == held
        assert equal == f"{(held - int(r)) / (m + n):.1f}"
        assert share == f"{count / (m * n):.2f}"
        assert int(lora) == round(count / (m + n))
