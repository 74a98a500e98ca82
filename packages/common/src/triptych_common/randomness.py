"""Randomness as a function of (seed, stream name, index).

Data order, noise, timesteps, label dropout and sampling all draw from here. The index is a sample's own number, never its
place in a batch. So nothing depends on batch size, the number of ranks or interruptions, and resuming needs counters but
no generator's state.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def _hash64(seed: int, stream: str, index: int = 0) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A CPU generator seeded for one index of one named stream."""
    # Hashed, so that neighbouring seeds, streams and indices are unrelated; manual_seed takes 63 bits.
    return torch.Generator().manual_seed(_hash64(seed, stream, index) >> 1)


def normal(
    seed: int, stream: str, indices: Sequence[int], shape: Sequence[int], *, dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "batch *shape"]:  # fmt: skip
    """Standard normal noise: a tensor of `shape` for each index, all drawn from that index's own generator.

    Each device has its own kind of generator: the numbers on a GPU differ from the CPU's, but depend on nothing else.
    """
    # Drawn in float32 and then cast, so that a float64 run sees the numbers of a float32 run.
    out = torch.empty(len(indices), *shape, device=device)
    source = torch.Generator(device)
    for row, index in zip(out, indices, strict=True):
        row.normal_(generator=source.manual_seed(_hash64(seed, stream, int(index)) >> 1))
    return out.to(dtype)


def uniform(seed: int, stream: str, indices: Sequence[int]) -> Float[Tensor, " batch"]:
    """One float64 in [0, 1) for each index: 53 bits of splitmix64, with the stream's key as its seed.  [Steele et al. 2014]"""
    z = _weyl(seed, stream, indices)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return _fraction(z ^ (z >> np.uint64(31)))


def evenly_spread(seed: int, stream: str, indices: Sequence[int]) -> Float[Tensor, " batch"]:
    """One float64 in [0, 1) for each index, evenly spread over consecutive indices: the golden-ratio sequence."""
    return _fraction(_weyl(seed, stream, indices))


def _weyl(seed: int, stream: str, indices: Sequence[int]) -> np.ndarray:
    """The stream's key plus index * _GOLDEN, modulo 2^64."""
    return np.uint64(_hash64(seed, stream)) + np.asarray(indices, dtype=np.uint64) * np.uint64(_GOLDEN)


def _fraction(z: np.ndarray) -> Float[Tensor, " batch"]:
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)  # float64 has 53 bits


def stream_keys(seed: int, streams: Sequence[str], device: torch.device | str = "cpu") -> Int[Tensor, " streams"]:
    """The key of each stream, for `counted_bits`."""
    return torch.tensor([_signed(_hash64(seed, stream)) for stream in streams], device=device)


def counted_bits(keys: Int[Tensor, "..."], counters: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """64 bits for each counter of each key, broadcast: splitmix64, on the tensors' device and the same on every one."""
    # torch shifts signed numbers: the copies of the sign are masked.
    z = keys + counters * _signed(_GOLDEN)
    z = z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(0xBF58476D1CE4E5B9))
    z = z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def counted_uniform(keys: Int[Tensor, "..."], counters: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A float32 in [0, 1) for each counter of each key, of 24 bits."""
    return (counted_bits(keys, counters) >> 40).bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)


def counted_normal(keys: Int[Tensor, "..."], counters: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A standard normal float32 for each counter of each key, by inversion; at most 5.4 in absolute value."""
    # Odd multiples of 2^-24 are exact in float32, symmetric, and never -1, 0 or 1.
    odd = (counted_bits(keys, counters) >> 39).bitwise_or_(1)
    return odd.float().mul_(2.0**-24).erfinv_().mul_(2.0**0.5)


def _signed(word: int) -> int:
    """64 bits as torch's integers hold them."""
    return word - (1 << 64) if word >> 63 else word


def permutation(seed: int, stream: str, index: int, n: int) -> Int[Tensor, " n"]:
    """The permutation of 0 .. n-1 for one index of a stream, such as an epoch."""
    return torch.randperm(n, generator=generator(seed, stream, index))


def shuffled(seed: int, stream: str, counters: Sequence[int], n: int) -> Int[Tensor, " batch"]:
    """The items at the given counters of an endless sequence over n items that is reshuffled after every n draws."""
    places = torch.as_tensor(counters, dtype=torch.long)
    out = torch.empty_like(places)
    # A batch may reach over the end of an epoch.
    for epoch in torch.unique(places // n).tolist():
        here = places // n == epoch
        out[here] = _epoch_order(seed, stream, epoch, n)[places[here] - epoch * n]
    return out


_epoch_order = lru_cache(maxsize=4)(permutation)  # 50 ms at a million items: too long for every batch


class SampleNoise:
    """The noise of a batch of samples, in the order in which a sampler asks for it.

    Each sample has its own generator, so its noise is the same in any batch and on any rank.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], *, device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        # Generators of the CPU, also for a GPU: each keeps its place between draws, and gives the same noise everywhere.
        self.generators = [generator(seed, "sample", int(index)) for index in indices]
        self.shape, self.device, self.dtype = tuple(shape), device, dtype

    def draw(self) -> Float[Tensor, "batch *shape"]:
        """The next standard normal tensor; the first is x_T."""
        out = torch.empty(len(self.generators), *self.shape)
        for row, source in zip(out, self.generators, strict=True):
            row.normal_(generator=source)
        return out.to(self.device, self.dtype)
