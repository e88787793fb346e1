"""What a pipeline family is: how prompts, latents and one network call look in its pipeline. All else is shared."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..diffusion import Kind
from ..kohya import Layers
from ..schedules import RectifiedFlow, Schedule, VariancePreserving


class Family(ABC):
    """One diffusers pipeline, seen as the few things that training needs of it. Latents keep the pipeline's own form.

    Subclasses give `pipeline`, `encode_prompts`, `forward`, and override what differs for them.
    """

    pipeline: ClassVar[str]  # name of the diffusers class
    net_name: ClassVar[str] = "transformer"  # attribute of the pipeline that is distilled; also the LoRA key prefix
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_prefix: ClassVar[str | None] = None  # of modules in kohya's LoRA files; None: the family has no such file
    # ComfyUI's node that shifts this flow model's times, "" for those of a table; None: ComfyUI is not known to sample it
    comfyui_shifter: ClassVar[str | None] = None
    sampler_guidance: ClassVar[float] = 1.0  # the pipeline's guidance_scale that means "no classifier-free guidance"
    guidance_distilled: ClassVar[bool] = False  # there is no unconditional prediction, so no guidance but scale 1
    rising: ClassVar[bool] = False  # the network's own time rises as noise falls
    frames: int | None = None  # of a video, [B, 3, frames, H, W] in pixels; None: pictures. The default of the pipeline
    fps: float | None = None  # frames a second of its videos
    passes_sigmas: ClassVar[bool] = False  # the pipeline hands its scheduler the sigmas 1 - k/n, unless it is told others

    def __init__(self, pipe: Any, size: tuple[int, int] | None = None, frames: int | None = None):
        """
        pipe: a loaded pipeline; its network, autoencoder and text encoders are used as they are.
        size: height and width in pixels; None: `native`. Some schedulers shift their times by it.
        frames: of a video; None: the pipeline's default.
        """
        self.pipe = pipe
        self.net: nn.Module = getattr(pipe, self.net_name)
        self.arrange()
        self.size, self.frames = size or self.native, frames or self.frames
        self.schedule = read_schedule(pipe.scheduler, self.tokens)
        self.kind = read_kind(pipe.scheduler)

    def arrange(self) -> None:
        """Put the weights of 2-D convolutions in the faster order; adapters that come later want it again."""
        for p in self.net.parameters():
            if p.ndim == 4:
                p.data = p.data.to(memory_format=torch.channels_last)

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """What `forward` needs of N prompts, each tensor [N, ...]."""

    @abstractmethod
    def forward(self, net: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The raw output [B, ...] of net for x_t [B, ...] at times t [B] in [0, 1]."""

    def timestep(self, t: Tensor) -> Tensor:
        """Times [B] in [0, 1] as the network hears them."""
        return t * 1000

    def default(self, name: str) -> Any:
        """What the pipeline takes for an argument of pipe(...) that it is not given."""
        return inspect.signature(self.pipe.__call__).parameters[name].default

    @property
    def sampler_call(self) -> dict[str, Any]:
        """Arguments that pipe(...) needs to do just what its network predicts, at `size`."""
        return {"guidance_scale": self.sampler_guidance}

    @property
    def passes_generator(self) -> bool:
        """The pipeline hands its scheduler the generator that it was given: those of most flow models do not."""
        return self.kind != "flow"

    def null_prompts(self) -> dict[str, Tensor] | None:
        """The unconditional input, each tensor [1, ...]; None if the teacher's guidance is distilled."""
        return None if self.guidance_distilled else self.encode_prompts([""])

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> latents (the posterior's mean), normalized as the network sees them."""
        vae = self.pipe.vae
        mean, std = self.moments()
        return ((vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean - mean) / std).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels [B, 3, H, W], nominally in [-1, 1], differentiable."""
        mean, std = self.moments()
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype) * std + mean, return_dict=False)[0].float()

    def moments(self) -> tuple[float | Tensor, float | Tensor]:
        """Mean and standard deviation of the autoencoder's latents; the network's have 0 and 1."""
        config = self.pipe.vae.config
        return config.get("shift_factor") or 0.0, 1 / config.scaling_factor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's latents at `size`."""
        return self.latent_shape(*self.size)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one sample's latents for a picture, or each frame, of that many pixels."""
        return (self.net.config.in_channels, height // self.factor, width // self.factor)

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """What height and width in pixels must be multiples of."""
        return 2 * self.factor  # transformers here see 2 x 2 latents as one token

    @property
    def tokens(self) -> int:
        """What a picture of `size` is to the network: so many tokens."""
        height, width = self.size
        return (height // self.multiple) * (width // self.multiple)

    @property
    def native(self) -> tuple[int, int]:
        """Height and width in pixels that the network was made for."""
        side = self.net.config.sample_size * self.factor
        return side, side

    @property
    def frame_multiple(self) -> int:
        """What the frames of a video after its first must be a multiple of."""
        return 1

    @property
    def encoders(self) -> list[nn.Module]:
        """The pipeline's parts that are neither its networks nor its autoencoder."""
        others = [getattr(self.pipe, name) for name in (*self.networks, "vae")]
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        return [part for part in parts if not any(part is other for other in others)]

    @property
    def networks(self) -> dict[str, str]:
        """Attributes of the pipeline whose networks make up `net`, each with what the names of its parameters begin with."""
        return {self.net_name: ""}

    def asked(self, time: float) -> str:
        """Which of `networks` the pipeline asks at a time in [0, 1]."""
        return self.net_name

    @property
    def takes(self) -> frozenset[str]:
        """Which lists of times the pipeline's caller may give: sigmas, timesteps, both or neither."""
        return frozenset({"sigmas", "timesteps"} & inspect.signature(self.pipe.__call__).parameters.keys())

    def packed(self, latents: Tensor) -> Tensor:
        """Latents [B, ...] as the pipeline's own `latents` argument wants them."""
        return latents

    def unpacked(self, made: Tensor) -> Tensor:
        """Latents [B, ...] of what the pipeline made at `size` with output_type="latent"."""
        return made.reshape(-1, *self.shape)

    @property
    def kohya_layers(self) -> Layers | None:
        """The network's layers as kohya's files name and join them; None: as the network does."""
        return None

    def kohya_lack(self) -> str:
        """Why there is no file in kohya's spelling; nothing if there is."""
        return "" if self.kohya_prefix else f"{self.pipeline} has no kohya file"

    def feature_block(self, net: nn.Module) -> nn.Module:
        """The block whose output a discriminator reads: one in the middle."""
        return net.transformer_blocks[len(net.transformer_blocks) // 2]

    def feature_tokens(self, out: Any, x_t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The picture's tokens [B, L, C] in that block's output, of what `forward` was asked."""
        return out

    def feature_width(self, net: nn.Module) -> int:
        """C of those tokens."""
        return net.config.num_attention_heads * net.config.attention_head_dim

    def add_guidance_embedding(self, net: nn.Module) -> None:
        """Give a whole copy an input for the guidance scale, of no effect until it is trained.

        Raises:
            ValueError: this pipeline's stock network has no such input.
        """
        raise ValueError(f"{self.pipeline} cannot embed a guidance scale in its network; set strategy.embed_guidance to null")


def read_kind(scheduler: Any) -> Kind:
    """What the network predicts, as the pipeline's scheduler reads it.

    Raises:
        ValueError: a prediction type that no family here knows.
    """
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        return "flow"
    kinds: dict[str, Kind] = {
        "epsilon": "eps",
        "v_prediction": "v",
        "sample": "x0",
        "flow_prediction": "flow",
        "trigflow": "flow",  # Sana-Sprint's network; its pipeline turns the output for its scheduler
    }
    name = scheduler.config.get("prediction_type", "epsilon")
    if name not in kinds:
        raise ValueError(f"scheduler prediction_type {name!r} is not one of {', '.join(kinds)}")
    return kinds[name]


def read_schedule(scheduler: Any, tokens: int = 0) -> Schedule:
    """The noise schedule of a pipeline's scheduler: rectified flow with its shift, or its DDPM table.

    tokens: of a picture; a dynamic shift, or its logarithm, is affine in them.
    """
    if read_kind(scheduler) != "flow":
        return VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod)
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return RectifiedFlow(shift=config.get("shift") or config.get("flow_shift") or 1.0)
    share = (tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
    return shifted(config, config.base_shift + share * (config.max_shift - config.base_shift))


def shifted(config: Mapping[str, Any], mu: float) -> RectifiedFlow:
    """The schedule of a flow scheduler with a dynamic shift, which its pipeline tells mu."""
    return RectifiedFlow(shift=math.exp(mu) if config["time_shift_type"] == "exponential" else mu)
