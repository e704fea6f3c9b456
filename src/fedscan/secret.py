"""Numbers that nobody can tell who does not hold the key: for noise, masks and keys that a site makes.

torch's generators will not do: the CPU's takes 32 bits of a seed, which can be tried one by one, and the numbers that
it has given tell those that it will give.
"""

import hashlib
import json
import math

import torch
from torch import Tensor

BLOCK = 1 << 20  # bytes that are made at a time


class Secret:
    """A stream of numbers from a key and a label: SHAKE-256 (FIPS 202) over both and the place in the stream.

    key    the secret, of 32 bytes
    label  what the numbers are for, in text and whole numbers; under each label they are others

    The same calls, in the same order, give the same bits. Each call goes on where the last one ended.
    """

    def __init__(self, key: bytes, *label: str | int) -> None:
        self._key, self._label, self._calls = len(key).to_bytes(8, "little") + key, label, 0

    def _next(self, count: int) -> bytearray:
        call, self._calls = self._calls, self._calls + 1
        found = bytearray()
        for block in range(math.ceil(count / BLOCK)):
            place = json.dumps([*self._label, call, block]).encode()
            found += hashlib.shake_256(self._key + place).digest(min(BLOCK, count - len(found)))
        return found

    def bits(self, *shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Whole numbers of this shape and dtype, all that it can hold equally likely: masks to add modulo it."""
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"bits are whole numbers, and {dtype} holds others")
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._next(count * dtype.itemsize), dtype=dtype).reshape(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers of this shape in [0, 1), float64 in steps of 2**-53."""
        return (self.bits(*shape, dtype=torch.int64) >> 11 & (1 << 53) - 1).double() * 2.0**-53

    def normal(self, *shape: int) -> Tensor:
        """Numbers of this shape with mean 0 and variance 1, float32. Box & Muller, Ann. Math. Statist. 29, 1958."""
        count = math.prod(shape)
        u, v = self.uniform(2, (count + 1) // 2)
        radius, angle = (-2 * torch.log1p(-u)).sqrt(), 2 * math.pi * v  # 1 - u is never 0
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].float().reshape(shape)
