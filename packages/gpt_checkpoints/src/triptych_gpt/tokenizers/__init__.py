"""Tokenizers: theta and noised theta* as tokens, and some of the tokens back as an update of theta.

Each is a module with

    token_kinds: how many consecutive tokens share each learned position embedding
    encode(noised, theta) -> Encoded
    decode(hidden [n, tokens, width], encoded) -> update [n, D], every entry written once
    initialize_weights(generator): what differs from N(0, 0.02); the decoders start at zero, and with them the update
"""

from triptych_gpt.config import GptConfig
from triptych_gpt.tokenizers.encoded import Encoded
from triptych_gpt.tokenizers.neuron import NeuronTokens
from triptych_gpt.tokenizers.sequence import SequenceTokens

__all__ = ["Encoded", "NeuronTokens", "SequenceTokens", "make_tokenizer"]


def make_tokenizer(config: GptConfig) -> NeuronTokens | SequenceTokens:
    """The tokenizer of a config. Raises ValueError where neuron tokens cannot hold one of the parameters."""
    return (NeuronTokens if config.tokenizer == "neuron" else SequenceTokens)(config)
