"""Dequantizing to BF16 with numpy, as well as numpy can: GB of BF16 written a second, beside `benches/dequantize.rs`.

    python3 -m venv venv && venv/bin/pip install numpy
    venv/bin/python benches/peers/dequantize_numpy.py [ROWS COLS]

The same four layouts, the same arithmetic (F32, then one rounding to nearest even) and the same random bytes' distribution.
numpy has no BF16: it is made of the upper half of F32, as two bytes. Work goes block by block so that temporaries stay in the
second-level cache, tables take in what they can, and every result goes to memory that exists. Each figure is the best of
several rounds, of the time that the processor worked for this process: numpy uses one thread for all of these.
Each format is first compared with a loop over single numbers.
"""

import sys
import time

import numpy as np

ROUNDS = 5
BLOCK_ROWS = 32
GROUP = 128


def bf16(values):
    """Rounds F32 to nearest even, to the upper halves; in place. No format here makes a NaN."""
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype(np.uint16)


def nibble_pairs(values):
    """For each byte the numbers of its low and its high nibble."""
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=1).astype(np.float32)


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PLAIN = np.arange(16, dtype=np.float32)


def e4m3():
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    return np.where(codes & 128, -values, values).astype(np.float32)


class Gptq4:
    """Words [cols / 8, rows], 8 codes of a column each; zero-points [groups, rows / 8], one less than they are."""

    def __init__(self, rows, cols, random):
        self.words = random.integers(0, 2**32, (cols // 8, rows), np.uint32)
        self.zeros = random.integers(0, 2**32, (cols // GROUP, rows // 8), np.uint32)
        self.scales = random.uniform(0.001, 0.02, (cols // GROUP, rows)).astype(np.float16)

    def run(self, target):
        shifts = np.arange(0, 32, 4, dtype=np.uint32)
        increased = self.zeros + np.uint32(0x11111111)
        zeros = ((increased[:, :, None] >> shifts) & 15).reshape(self.scales.shape).astype(np.float32)
        scales = self.scales.astype(np.float32)
        words_per_group = GROUP // 8
        for g in range(len(scales)):
            words = self.words[g * words_per_group : (g + 1) * words_per_group]
            for first in range(0, words.shape[1], 256):
                part = slice(first, first + 256)
                codes = ((words[:, None, part] >> shifts[None, :, None]) & 15).reshape(GROUP, -1)
                values = codes.astype(np.float32)
                values -= zeros[g, part]
                values *= scales[g, part]
                target[part, g * GROUP : (g + 1) * GROUP] = bf16(values).T

    def one(self, n, k):
        g = k // GROUP
        zero = (((int(self.zeros[g, n // 8]) + 0x11111111) & 0xFFFFFFFF) >> (4 * (n % 8))) & 15
        code = (int(self.words[k // 8, n]) >> (4 * (k % 8))) & 15
        return np.float32(code - zero) * np.float32(self.scales[g, n])


class Rows:
    """Bytes [rows, cols * bits / 8] whose numbers a table tells, times a scale for each group of columns."""

    def __init__(self, rows, cols, random, table, group, scales):
        codes_per_byte = table.ndim
        self.codes = random.integers(0, 256, (rows, cols // codes_per_byte), np.uint8)
        self.table, self.group, self.scales, self.cols = table, group, scales, cols

    def run(self, target):
        rows = len(self.codes)
        for first in range(0, rows, BLOCK_ROWS):
            part = slice(first, min(first + BLOCK_ROWS, rows))
            values = self.table.take(self.codes[part], axis=0).reshape(-1, self.cols)
            groups = values.reshape(len(values), -1, self.group)
            groups *= self.scales(part)[:, :, None]
            target[part] = bf16(values)

    def one(self, n, k):
        scale = self.scales(slice(n, n + 1))[0, k // self.group]
        if self.table.ndim == 1:
            return self.table[self.codes[n, k]] * scale
        return self.table[self.codes[n, k // 2], k % 2] * scale


def formats(rows, cols, random):
    bf16_scales = random.uniform(0.001, 0.02, (rows, cols // GROUP)).astype(np.float32).view(np.uint32) >> 16
    bf16_scales = bf16_scales.astype(np.uint16)
    exponents = random.integers(110, 125, (rows, cols // 32), np.uint8)
    blocks = random.uniform(0.001, 0.02, (-(-rows // 128), cols // 128)).astype(np.float32)
    fp8 = e4m3()
    fp8[[127, 255]] = 0  # Codes of NaN, which writers do not write.
    powers = np.ldexp(np.float32(1), np.arange(255) - 127)

    def of_ct(part):
        return (bf16_scales[part].astype(np.uint32) << 16).view(np.float32)

    def of_blocks(part):
        return blocks[np.arange(part.start, part.stop) // 128]

    return {
        "gptq int4 g128": Gptq4(rows, cols, random),
        "ct pack int4 g128": Rows(rows, cols, random, nibble_pairs(PLAIN - 8), GROUP, of_ct),
        "fp8 block 128x128": Rows(rows, cols, random, fp8, 128, of_blocks),
        "mxfp4": Rows(rows, cols, random, nibble_pairs(E2M1), 32, lambda part: powers[exponents[part]]),
    }


def check(random):
    rows, cols = 160, 256
    for name, packed in formats(rows, cols, random).items():
        target = np.empty((rows, cols), np.uint16)
        packed.run(target)
        expected = np.array([[packed.one(n, k) for k in range(cols)] for n in range(rows)], np.float32)
        assert (target == bf16(expected)).all(), name


def main():
    rows, cols = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4096, 4096)
    random = np.random.default_rng(1)
    check(random)
    target = np.zeros((rows, cols), np.uint16)
    for name, packed in formats(rows, cols, random).items():
        best = float("inf")
        for _ in range(ROUNDS):
            start = time.process_time()
            packed.run(target)
            best = min(best, time.process_time() - start)
        print(f"{name:24} {target.nbytes / 1e9 / best:6.2f} GB/s of BF16 a core")


if __name__ == "__main__":
    main()
