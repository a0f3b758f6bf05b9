"""Networks as folders: weights as safetensors, the shape as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

Config = TypeVar("Config")
Network = TypeVar("Network", bound=nn.Module)


def write_network(
    network: nn.Module, config: Any, directory: str | Path, config_file: str = CONFIG_FILE
) -> None:
    """Write weights and shape of a network; reading them back gives the same bits.

    :param config: a dataclass.
    :param directory: folder, made if it is absent.
    :param config_file: name of the file of the shape.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    text = json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
    (folder / config_file).write_text(text + "\n", encoding="utf-8")


def read_config(
    directory: str | Path,
    make: Callable[..., Config],
    who: str = "Transformer",
    config_file: str = CONFIG_FILE,
) -> Config:
    """Read the shape of a network.

    :param make: the dataclass that it was.
    :param who: what errors call the network.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it holds something else.
    """
    path = Path(directory) / config_file
    _require(path, who)
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return make(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{who}: {path} is no network configuration ({error}); write it anew."
        ) from error


def read_weights(network: nn.Module, directory: str | Path) -> None:
    """Read the weights of a network in place.

    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if it is corrupt or of another network.
    """
    path, who = Path(directory) / WEIGHTS_FILE, type(network).__name__
    _require(path, who)
    try:
        network.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(
            f"{who}: {path} is not a readable safetensors file ({error}); fetch it anew."
        ) from error
    except RuntimeError as error:
        raise ValueError(
            f"{who}: the weights in {path} do not fit the configuration beside them; "
            "keep the two files of one network together."
        ) from error


def read_network(
    cls: Callable[[Any], Network],
    make: Callable[..., Any],
    directory: str | Path,
    config_file: str = CONFIG_FILE,
) -> Network:
    """Read a network that :func:`write_network` wrote, in evaluation mode.

    :param cls: the class of the network, made of its shape.
    :param make: the dataclass of the shape.
    :param directory: the folder.
    :raises FileNotFoundError: if a file is absent.
    :raises ValueError: if one is damaged, or they do not belong together.
    """
    who = getattr(cls, "__name__", "network")
    config = read_config(directory, make, who, config_file)
    # The random start is overwritten; it must not move the caller's generator.
    with torch.random.fork_rng(devices=[]):
        network = cls(config)
    read_weights(network, directory)
    return network.eval()


class SavedNetwork(nn.Module):
    """A network made of its shape alone, that is saved as a folder.

    :cvar config_class: the dataclass of the shape, kept as ``config``.
    """

    config_class: ClassVar[Any]
    config: Any

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json``; reading them back gives the same bits.

        :param directory: folder, made if it is absent.
        """
        write_network(self, self.config, directory)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read a network that :meth:`save_pretrained` wrote, in evaluation mode.

        :param directory: folder with ``model.safetensors`` and ``config.json``.
        :raises FileNotFoundError: if one of the two files is absent.
        :raises ValueError: if a file is corrupt or the two do not belong together.
        """
        return read_network(cls, cls.config_class, directory)


def _require(path: Path, who: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"{who}: {path} does not exist; give the folder that a network was saved to."
        )
