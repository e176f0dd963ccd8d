"""Trellis-coded quantisation: a path through twice the levels that are coded, worth a sixth of a bit a weight.

Levels lie half a step apart. Whether the next one is even or odd, a state says; the integer q that is coded is the
level without that bit, and the last bit of q moves the state on (Ungerboeck's code of eight states). So q takes the
bits of rounding to whole steps, and the path of least error, found by Viterbi's algorithm, has a decibel less of it.
A path runs down a column through TRELLIS_ROWS rows, and the next rows begin at state 0 again: paths are side by side.
Letters: N rows, K inputs of a row, T rows of a path, P paths side by side, S states.
"""

import numpy as np
import torch

TRELLIS_ROWS = 64
TRELLIS_STATES = 8
TRELLIS_TAPS = 5, 2  # what a level's parity and the last bit of q add to the state: polynomials 13, 04 octal
TRELLIS_MOST = 127  # the largest q
TRELLIS_PATHS = 4096  # walked at a time: they stay in the caches


def trellis_next(state, odd, q):
    """The state after a level of parity `odd` and the integer q."""
    return state >> 1 ^ odd * TRELLIS_TAPS[0] ^ (q & 1) * TRELLIS_TAPS[1]


def trellis_value(q: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """q int8 (..., N, K), step float16 (..., N) -> the float32 weights they mean."""
    rows = q.reshape(-1, q.shape[-1])
    level, state = 2 * rows.float(), torch.zeros_like(rows[::TRELLIS_ROWS])
    for t in range(min(TRELLIS_ROWS, len(rows))):
        part = rows[t::TRELLIS_ROWS]
        odd = state[: len(part)] & 1
        level[t::TRELLIS_ROWS] += odd
        state[: len(part)] = trellis_next(state[: len(part)], odd, part)
    return (level * (0.5 * step.float().reshape(-1, 1))).reshape(q.shape)


def trellis_grid(w: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w (..., N, K), a step for each row (..., N) -> q int8 like w, step as float16 stores it; a step of 0 gives 0."""
    step = step.half()
    x = w * torch.where(step > 0, 1 / step.float(), 0)[..., None]
    return trellis_levels(x.reshape(-1, w.shape[-1])).floor().to(torch.int8).reshape(w.shape), step


def trellis_levels(x: torch.Tensor) -> torch.Tensor:
    """Weights (N, K) in steps -> the multiples of a half they become."""
    whole = len(x) // TRELLIS_ROWS * TRELLIS_ROWS
    return torch.cat([_side_by_side(part) for part in (x[:whole], x[whole:]) if part.numel()] or [x])


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Whole blocks of TRELLIS_ROWS rows, or a last block that is shorter."""
    blocks = x.unflatten(0, (-1, min(TRELLIS_ROWS, len(x)))).transpose(0, 1)  # (T, blocks, K)
    paths = blocks.reshape(len(blocks), -1).cpu().numpy()
    levels = [trellis_path(paths[:, at : at + TRELLIS_PATHS]) for at in range(0, paths.shape[1], TRELLIS_PATHS)]
    return torch.from_numpy(np.concatenate(levels, 1)).to(x.device).reshape(blocks.shape).transpose(0, 1).flatten(0, 1)


def trellis_path(x: np.ndarray) -> np.ndarray:
    """x (T, P) in steps -> the allowed levels, in steps, that are nearest to each column as a whole."""
    source, rest = trellis_ways()
    r = np.arange(4, dtype=np.float32)[:, None]
    levels = r + 4 * np.rint((2 * x[:, None] - r) / 4).clip(-(TRELLIS_MOST // 2), TRELLIS_MOST // 2)  # (T, 4, P)
    away = np.square(levels - 2 * x[:, None])
    cost = np.where(np.arange(TRELLIS_STATES) > 0, np.inf, 0).astype(np.float32)[:, None].repeat(x.shape[1], 1)
    second = np.empty((len(x), TRELLIS_STATES, x.shape[1]), bool)
    for t, (one, other) in enumerate(zip(away[:, rest[0]], away[:, rest[1]])):
        one, other = cost[source[0]] + one, cost[source[1]] + other
        np.less(other, one, out=second[t])
        cost = np.minimum(one, other)
    came = np.where(second, source[1, :, None], source[0, :, None])  # (T, S, P)
    taken = np.where(second, levels[:, rest[1]], levels[:, rest[0]]) / 2
    state, path, out = cost.argmin(0), np.arange(x.shape[1]), np.empty_like(x)
    for t in reversed(range(len(x))):
        out[t], state = taken[t, state, path], came[t, state, path]
    return out


def trellis_ways() -> tuple[np.ndarray, np.ndarray]:
    """The two ways into each state, (2, S): the states they come from, and the remainder by 4 of the level between."""
    ways = [[] for _ in range(TRELLIS_STATES)]
    for state in range(TRELLIS_STATES):
        for bit in (0, 1):
            ways[trellis_next(state, state & 1, bit)].append((state, (state & 1) + 2 * bit))
    return tuple(np.array(ways).transpose(2, 1, 0))
