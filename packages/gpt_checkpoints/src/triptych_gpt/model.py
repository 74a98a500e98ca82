"""G.pt, the diffusion transformer over checkpoints.  [thesis 3.2.2]"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from triptych_common.fields import Gt
from triptych_common.storage.files import open_ended
from triptych_common.storage.model_file import ModelFormat
from triptych_common.transformer import Block
from typing_extensions import TypedDict

from triptych_gpt.config import GptConfig
from triptych_gpt.tokenizers import TOKENS, ScalarTokens, make_tokenizer

FILE_NAME = "model.safetensors"


@open_ended
class _Facts(TypedDict):
    config: dict[str, Any]
    scale: Annotated[float, Gt(0)]
    metric: str
    better: Literal["lower", "higher"]
    trained_range: tuple[float, float] | None
    task: dict[str, Any]


FORMAT = ModelFormat(
    kinds=("G.pt",),
    file_name=FILE_NAME,
    expected="a trained G.pt",
    mismatch="not a G.pt's model file",
    made=f"triptych-gpt train --out FOLDER makes {FILE_NAME}, triptych-gpt convert one of a released model",
    absent="no trained model; make one with triptych-gpt train --out {folder}",
    facts=_Facts,
)


class Gpt(nn.Module):
    """Predicts theta*, a later checkpoint of theta's run whose metric is `target`, from noised theta*.

    noised, theta: parameters multiplied by the model's scale. t: the diffusion timestep, from 0. metric: of theta; target: the
    prompt, which is theta*'s metric in training. Both are in the metric's own units.
    Raises ValueError for normalised scalars without a metric scale, and for networks that the tokenizer does not know.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.tokenizer = make_tokenizer(config)
        self.scalars = ScalarTokens(config)
        # Positions are learned, one for each kind of token.
        self.token_kinds = [*self.tokenizer.token_kinds, *[1] * TOKENS[config.scalars]]
        self.norm_in = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.zeros(len(self.token_kinds), width))
        # As in GPT, not DiT: norms with weights and torch's epsilon, exact GELU, no modulation by the timestep, which is a token.
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, affine_norm=True, attn_norm_eps=1e-5, mlp_norm_eps=1e-5, gelu="none")
            for _ in range(config.depth)
        )
        self.norm_out = nn.LayerNorm(width)
        self.initialize_weights()

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Linear weights from N(0, 0.02), the rest zero, but for what the tokenizer initialises."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.positions)
        self.tokenizer.initialize_weights(generator)

    def forward(
        self,
        noised: Float[Tensor, "n D"],
        t: Num[Tensor, " n"],
        theta: Float[Tensor, "n D"],
        metric: Float[Tensor, " n"],
        target: Float[Tensor, " n"],
    ) -> Float[Tensor, "n D"]:
        """theta*, predicted: scaled parameters like `noised` and `theta`.

        noised: theta* at timestep t (0 to 999). theta: the starting networks. metric: what they score; target: the prompt.
        """
        encoded = self.tokenizer.encode(noised, theta)
        tokens = torch.cat([encoded.tokens, self.scalars(t, metric, target)], dim=1)
        # The released order: tokens are normalised before positions are added.
        x = self.norm_in(tokens) + self._positions()  # n tokens width
        for i, block in enumerate(self.blocks):
            x = block(x, bias=None if encoded.biases is None else encoded.biases[i])
        # The sample is predicted, not the noise, and as an update of theta: an untrained model is the identity.
        return theta + self.tokenizer.decode(self.norm_out(x), encoded)

    def _positions(self) -> Float[Tensor, "tokens width"]:
        """A row for each token; units of a group share one, so that none of them has a place."""
        rows = self.positions.unbind()
        return torch.cat([row.expand(count, -1) for row, count in zip(rows, self.token_kinds, strict=True)])


def decayed(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay, which are the weights of Linear layers, and those without."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) in linear], [p for p in parameters if id(p) not in linear]


def write_model(path: Path, config: GptConfig, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a model file. facts: scale, metric, better, trained_range and task, as `load` needs them, and any others."""
    FORMAT.write(path, tensors, config.to_json(), facts)
