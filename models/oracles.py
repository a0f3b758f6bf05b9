"""Expression oracles: small ensembles that predict a promoter's expression and how sure they are.

An oracle maps 80 bases to the mean expression of the promoter in complex medium, measured by the
reporter assay of Vaishnav et al. (Nature 603, 2022; arbitrary log-like units from 0 to 17), and to
a standard deviation of the next measurement. Two are shipped, fitted on disjoint families of
sequences: design with one, let the other judge.

Each member of the ensemble scans both strands with the same filters, keeps the best hit of every
few bases, mixes the hits with dilated residual convolutions, and ends in a mean and a log-variance.
One more member is linear in k-mer counts: it errs differently, which improves the mean, and it
disagrees with the networks far from the data, which widens the spread there.
``ppl_diffusion.models.oracle_training`` fits, calibrates and evaluates them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ppl_diffusion.models.cards import find_folder, list_oracles
from ppl_diffusion.models.markov_baseline import kmers

BASES = "ACGT"
_LOG_VARIANCE = (-6.0, 3.0)  # of the standardised target; keeps the likelihood finite in training


@dataclass(frozen=True)
class OracleConfig:
    """Everything but the weights.

    :param half: which half of the families it was fitted on, ``"design"`` or ``"judge"``.
    :param members: networks in the ensemble, the linear member not counted.
    :param kmer: bases of a k-mer of the linear member.
    :param left: constant bases before the sequence in the assay, and ``right`` after it, read by
        the first layer.
    :param filters: motif filters of the first layer, each used on both strands.
    :param width: bases under one filter.
    :param pool: neighbouring positions of which the best hit is kept.
    :param kernel: positions under one residual convolution.
    :param dropout: share of the units left out in training.
    :param centre: mean of the training target in expression units, and ``scale`` its deviation.
    :param spread: factor on every predicted standard deviation, fitted on validation sequences.
    """

    name: str = "oracle"
    half: str = ""
    members: int = 2
    kmer: int = 6
    length: int = 80
    left: str = "TGCATTTTTTTCACATC"
    right: str = "GGTTACGGCTGTT"
    filters: int = 48
    width: int = 12
    pool: int = 4
    channels: int = 48
    kernel: int = 5
    dilations: tuple[int, ...] = (1, 2, 4)
    hidden: int = 64
    dropout: float = 0.2
    centre: float = 0.0
    scale: float = 1.0
    spread: float = 1.0

    @classmethod
    def read(cls, path: Path) -> OracleConfig:
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**entries, "dilations": tuple(entries["dilations"])})
        except (ValueError, TypeError, KeyError) as error:
            expected = ", ".join(f.name for f in fields(cls))
            raise ValueError(
                f"The oracle configuration {path} cannot be read ({error}): "
                f"it must be a JSON object with the entries {expected}."
            ) from error


class _Residual(nn.Module):
    """``x + dropout(relu(norm(conv(x))))``, same length."""

    def __init__(self, config: OracleConfig, dilation: int) -> None:
        super().__init__()
        channels, kernel = config.channels, config.kernel
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv1d(channels, channels, kernel, padding=padding, dilation=dilation)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(config.dropout / 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.relu(self.norm(self.conv(x))))


class Member(nn.Module):
    """One network of the ensemble, in standardised units."""

    def __init__(self, config: OracleConfig) -> None:
        super().__init__()
        self.pool = config.pool
        self.scan = nn.Conv1d(len(BASES), config.filters, config.width)
        self.norm = nn.BatchNorm1d(2 * config.filters)
        self.mix = nn.Conv1d(2 * config.filters, config.channels, 1)
        self.blocks = nn.Sequential(*(_Residual(config, d) for d in config.dilations))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(config.channels * (config.length // config.pool), config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 3),
        )

    def forward(self, one_hot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict mean, log-variance, and the mean of an auxiliary target used only in training."""
        hits = F.max_pool1d(F.relu(self.norm(self._scan_strands(one_hot))), self.pool)
        mean, log_variance, auxiliary = self.head(self.blocks(self.mix(hits))).unbind(-1)
        return mean, log_variance.clamp(*_LOG_VARIANCE), auxiliary

    def _scan_strands(self, one_hot: Tensor) -> Tensor:
        # A=0 and T=3, C=1 and G=2: flipping the base axis complements, flipping width reverses.
        filters = torch.cat([self.scan.weight, self.scan.weight.flip(1, 2)])
        bias = self.scan.bias
        assert bias is not None
        return F.conv1d(one_hot, filters, bias.repeat(2))


class KmerLinear(nn.Module):
    """A function linear in k-mer counts, in standardised units."""

    weight: Tensor
    bias: Tensor

    def __init__(self, config: OracleConfig) -> None:
        super().__init__()
        self.k = config.kmer
        self.register_buffer("weight", torch.zeros(len(BASES) ** self.k))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, one_hot: Tensor) -> Tensor:
        """Return the expectation over independent bases ``(B, L, 4)``; exact at one-hot ones."""
        windows = one_hot.unfold(1, self.k, 1)  # (B, windows, 4, k)
        table = self.weight.reshape(-1, len(BASES))
        value = windows[..., -1] @ table.T  # sums over the last base of all k-mers
        for i in reversed(range(self.k - 1)):
            value = (value.unflatten(-1, (-1, len(BASES))) * windows[..., None, :, i]).sum(-1)
        return self.bias + value.sum((1, 2))

    def look_up(self, tokens: Tensor) -> Tensor:
        """Return the values ``(B,)`` of tokens ``(B, L)``, much faster than :meth:`forward`."""
        return self.bias + self.weight[kmers(tokens, self.k, len(BASES))].sum(-1)


class Oracle(nn.Module):
    """An ensemble that predicts expression from 80 bases, with a calibrated spread.

    ``oracle(tokens)`` is the mean and may be used as a reward; ``oracle.predict(tokens)`` adds the
    standard deviation. Both run without gradient and in pieces, so that any batch fits in memory;
    :meth:`from_one_hot` is the differentiable twin.

    :param config: shape, units and calibration.

    :ivar length: bases of a sequence.
    :ivar vocab_size: number of bases, in the order A, C, G, T.
    """

    _left: Tensor
    _right: Tensor

    def __init__(self, config: OracleConfig) -> None:
        super().__init__()
        self.config = config
        self.length, self.vocab_size = config.length, len(BASES)
        self.members = nn.ModuleList(Member(config) for _ in range(config.members))
        self.linear = KmerLinear(config)
        self.register_buffer("_left", one_hot(_encode(config.left)), persistent=False)
        self.register_buffer("_right", one_hot(_encode(config.right)), persistent=False)
        self.eval()

    @property
    def name(self) -> str:
        return self.config.name

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the mean expression, float32 ``(*batch,)``, as :meth:`predict` does."""
        return self.predict(tokens)[0]

    @torch.no_grad()
    def predict(self, tokens: Tensor, *, chunk_size: int = 256) -> tuple[Tensor, Tensor]:
        """Predict mean and standard deviation of a measurement of each sequence.

        :param tokens: int64 ``(*batch, length)``, A=0, C=1, G=2, T=3.
        :returns: two float32 tensors ``(*batch,)`` in the units of the assay (0 to 17).
        :raises ValueError: if the length or a token is wrong.
        """
        self._check(tokens)
        rows = tokens.reshape(-1, self.length)
        parts = rows.split(chunk_size)
        pieces = [self._combine(one_hot(part), self.linear.look_up(part)) for part in parts]
        mean, sd = (torch.cat(part) for part in zip(*pieces, strict=True))
        return mean.reshape(tokens.shape[:-1]), sd.reshape(tokens.shape[:-1])

    def from_one_hot(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from one-hot or relaxed sequences; differentiable.

        :param probabilities: float ``(B, length, 4)``.
        :returns: mean and standard deviation, ``(B,)`` each.
        """
        return self._combine(probabilities, self.linear(probabilities))

    def _combine(self, probabilities: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the ensemble, every member counting alike."""
        x = self.with_flanks(probabilities)
        outputs = [member(x) for member in self.members]
        means = torch.stack([*(output[0] for output in outputs), linear])
        noise = torch.stack([output[1].exp() for output in outputs]).mean(0)
        mean = means.mean(0)
        sd = (noise + (means - mean).square().mean(0)).sqrt()
        config = self.config
        return config.centre + config.scale * mean, config.spread * config.scale * sd

    def with_flanks(self, probabilities: Tensor, shift: int = 0) -> Tensor:
        """Put the constant neighbours of the assay around the sequences, as far as they are read.

        :param probabilities: float ``(B, length, 4)``.
        :param shift: bases by which the window is moved to the right (training only).
        :returns: float ``(B, 4, length + width - 1)``, what the members read.
        """
        count, width = len(probabilities), self.config.width
        left, right = (flank.expand(count, -1, -1) for flank in (self._left, self._right))
        start = left.shape[1] - (width - 1) // 2 + shift
        whole = torch.cat([left, probabilities, right], 1)
        window = whole[:, start : start + self.length + width - 1]
        return window.transpose(1, 2).contiguous()

    def save(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into a folder, made if it is absent."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        text = json.dumps(asdict(self.config), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Oracle:
        """Read the folder that :meth:`save` wrote.

        :raises FileNotFoundError: if one of the two files is absent.
        :raises ValueError: if the files do not fit together.
        """
        folder = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"The folder {str(folder)!r} holds no oracle: {name} is missing."
                )
        oracle = cls(OracleConfig.read(folder / "config.json"))
        try:
            oracle.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"The weights in {str(folder)!r} do not fit its config.json: "
                f"{str(error).splitlines()[0]} Train the oracle again or restore its folder."
            ) from error
        return oracle.requires_grad_(False).eval()

    def _check(self, tokens: Tensor) -> None:
        if tokens.dtype != torch.int64 or tokens.ndim == 0 or tokens.shape[-1] != self.length:
            raise ValueError(
                f"The oracle {self.name!r} reads int64 tokens of shape (*batch, {self.length}), "
                f"but it was given {str(tokens.dtype).removeprefix('torch.')} of shape "
                f"{tuple(tokens.shape)}: encode the sequences at that length."
            )
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < len(BASES)):
            raise ValueError(
                f"The oracle {self.name!r} reads bases 0 to 3, but it was given tokens from "
                f"{int(tokens.min())} to {int(tokens.max())}: fill masked positions first."
            )


def one_hot(tokens: Tensor) -> Tensor:
    """Encode bases ``(*batch, L)`` as float32 ``(*batch, L, 4)``."""
    return F.one_hot(tokens, len(BASES)).to(torch.float32)


def load_oracle(name_or_dir: str | Path) -> Oracle:
    """Load a shipped oracle by name, or any oracle from its folder.

    :raises ValueError: if neither a shipped oracle nor a folder has that name.
    """
    return Oracle.load(find_folder(name_or_dir, list_oracles(), "oracle"))


def _encode(bases: str) -> Tensor:
    return torch.tensor([BASES.index(base) for base in bases], dtype=torch.int64)
