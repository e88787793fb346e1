"""The names of LoRA layers that ComfyUI accepts, made by rule for a network's depth (its comfy/lora.py and comfy/utils.py).

Of a UNet its table goes from diffusers' names to the first code's; to_q and its like get `.processor` before them in dotted
names, which is why files in PEFT's spelling lose their attention there. FLUX.1 and SD3 are accepted in PEFT's spelling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

RESNET = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "norm1", "norm2")
OUTSIDE = ("proj_in", "proj_out", "norm")
ATTENTION = tuple(f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
INSIDE = ("norm1", "norm2", "norm3", *ATTENTION, "ff.net.0.proj", "ff.net.2")


def unet(layers: int, depths: Sequence[int], middle: int) -> set[str]:
    """For a UNet with so many resnets a level, and so many transformer blocks in each attention of each level."""
    names = {name for name in unet_layers(layers, depths, middle)}
    dotted = {name.replace(".to_", ".processor.to_").removesuffix(".0" if name.endswith("to_out.0") else "-") for name in names}
    return {"lora_unet_" + name.replace(".", "_") for name in names} | dotted | {f"unet.{name}" for name in dotted}


def unet_layers(layers: int, depths: Sequence[int], middle: int) -> Iterator[str]:
    def attention(place: str, depth: int) -> Iterator[str]:
        if depth:
            yield from (f"{place}.{name}" for name in OUTSIDE)
            yield from (f"{place}.transformer_blocks.{t}.{name}" for t in range(depth) for name in INSIDE)

    for side, count in (("down", layers), ("up", layers + 1)):
        for level, depth in enumerate(depths if side == "down" else depths[::-1]):
            for i in range(count):
                yield from (f"{side}_blocks.{level}.resnets.{i}.{name}" for name in RESNET)
                yield from attention(f"{side}_blocks.{level}.attentions.{i}", depth)
            yield f"{side}_blocks.{level}.{side}samplers.0.conv"
    for i in (0, 1):
        yield from (f"mid_block.resnets.{i}.{name}" for name in RESNET)
    yield from attention("mid_block.attentions.0", middle)
    yield from ("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2")
    yield from ("add_embedding.linear_1", "add_embedding.linear_2")


STREAM = ("attn.to_out.0", "attn.to_add_out", "norm1.linear", "norm1_context.linear")
MLPS = tuple(f"{ff}.{layer}" for ff in ("ff", "ff_context") for layer in ("net.0.proj", "net.2"))
JOINT = (*(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")), *STREAM, *MLPS)
EMBEDDERS = tuple(
    f"time_text_embed.{name}_embedder.linear_{n}" for name in ("timestep", "text", "guidance") for n in (1, 2)
)  # fmt: skip
ENDS = ("proj_out", "norm_out.linear", "context_embedder", *EMBEDDERS)


def flux(double: int, single: int) -> set[str]:
    """For FLUX.1: kohya's names are those of every weight of the first code, PEFT's go through a table."""
    theirs = [f"double_blocks.{i}.{side}_{name}" for i in range(double) for side in ("img", "txt") for name in FIRST_DOUBLE]
    theirs += [f"single_blocks.{i}.{name}" for i in range(single) for name in ("linear1", "linear2", "modulation.lin")]
    theirs += [f"{name}_in.{end}_layer" for name in ("time", "vector", "guidance") for end in ("in", "out")]
    theirs += ["img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    ours = [f"transformer_blocks.{i}.{name}" for i in range(double) for name in JOINT]
    inner = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out", "norm.linear")
    ours += [f"single_transformer_blocks.{i}.{name}" for i in range(single) for name in inner]
    ours += ["x_embedder", *ENDS]
    return {"lora_unet_" + name.replace(".", "_") for name in theirs} | {f"transformer.{name}" for name in ours}


FIRST_DOUBLE = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")


def sd3(blocks: int) -> set[str]:
    """For SD3, which ComfyUI reads in PEFT's spelling."""
    inner = [f"transformer_blocks.{i}.{name}" for i in range(blocks) for name in JOINT]
    return {f"transformer.{name}" for name in (*inner, "pos_embed.proj", *ENDS)}
