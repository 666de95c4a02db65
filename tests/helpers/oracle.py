"""Independent float64 simulation of Muon, written from the papers' equations in numpy."""

import struct

import numpy as np

JORDAN = (3.4445, -4.775, 2.0315)


def newton_schulz(matrix: np.ndarray, steps: list[tuple[float, float, float]], eps: float = 1e-7) -> np.ndarray:
    x = matrix / max(np.linalg.norm(matrix), eps)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T, steps, eps).T
    for a, b, c in steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon64:
    """One matrix under Muon, everything in float64 and unquantized."""

    def __init__(
        self, weight: np.ndarray, lr=1e-3, decay=0.1, beta=0.95, nesterov=True, rule="original", steps=5,
        cautious=False, decay_lr_power=1,
    ):  # fmt: skip
        self.weight, self.lr, self.decay, self.beta = weight.astype(np.float64), lr, lr * decay, beta
        self.cautious = cautious
        self.nesterov, self.steps = nesterov, [JORDAN] * steps
        rows, cols = weight.shape
        rms_rule = rule == "match_rms_adamw"
        self.ratio = 0.2 * max(rows, cols) ** 0.5 if rms_rule else max(1.0, rows / cols) ** 0.5
        self.decay *= lr * self.ratio if decay_lr_power == 2 else 1  # modded-nanogpt's: by the update's own rate again
        self.momentum = np.zeros_like(self.weight)

    def step(self, grad: np.ndarray) -> None:
        grad = grad.astype(np.float64)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * grad
        blend = self.beta * self.momentum + (1 - self.beta) * grad if self.nesterov else self.momentum
        direction = newton_schulz(blend, self.steps)
        decays = direction * self.weight >= 0 if self.cautious else True
        self.weight = self.weight - self.decay * decays * self.weight - self.lr * self.ratio * direction


def encode_sqrt(moment: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return linear codes of the roots of fp32 [rows, cols], 1 to 255 but for 0, and an fp32 scale a block."""
    root, starts = np.sqrt(moment), range(0, moment.shape[1], block_size)
    scales = np.stack([root[:, start : start + block_size].max(axis=1) for start in starts], axis=1)
    inverse = np.divide(np.float32(255), scales, out=np.zeros_like(scales), where=scales > 0)
    codes = np.rint(root * _by_column(inverse, block_size, moment.shape[1]))
    return np.maximum(codes, moment > 0).astype(np.uint8), scales


def decode_sqrt(codes: np.ndarray, scales: np.ndarray, block_size: int) -> np.ndarray:
    """Return the fp32 second moment of uint8 codes and fp32 scales."""
    step = _by_column(scales / np.float32(255), block_size, codes.shape[1])
    return (codes.astype(np.float32) * step) ** 2


def _by_column(blocks: np.ndarray, block_size: int, cols: int) -> np.ndarray:
    return np.repeat(blocks, block_size, axis=1)[:, :cols]


def murmur3(data: bytes, seed: int = 0) -> int:
    """Return MurmurHash3_x86_32 of whole 32-bit words, after the author's description."""
    h, mask = seed, 0xFFFFFFFF
    for (k,) in struct.iter_unpack("<I", data):
        k = k * 0xCC9E2D51 & mask
        k = (k << 15 | k >> 17) & mask
        h ^= k * 0x1B873593 & mask
        h = (h << 13 | h >> 19) & mask
        h = (h * 5 + 0xE6546B64) & mask
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & mask
    h = (h ^ h >> 13) * 0xC2B2AE35 & mask
    return h ^ h >> 16


def random_bits(seed, step, param_index, element):
    return murmur3(struct.pack("<QQIQ", seed, step, param_index, element))


def round_stochastic(values, seed, step, param_index):
    """Return what bf16 keeps of a finite fp32 array, in fp32, with 16 random bits added to the magnitude's last 16."""
    words = [random_bits(seed, step, param_index, i) & 0xFFFF for i in range(values.size)]
    bits = values.ravel().view(np.uint32).astype(np.uint64) + np.array(words, dtype=np.uint64)
    return (bits & 0xFFFF0000).astype(np.uint32).view(np.float32).reshape(values.shape)
