"""Which group sizes a checkpoint's linears take, known from its headers alone."""

from training.merge_checkpoint import Checkpoint

GROUP_SIZES = (128, 64, 32)  # inputs that share one scale; the largest is the smallest file
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PACK = 8  # 4-bit codes in an int32: outputs are packed by so many in the zero points


def linear_names(checkpoint: Checkpoint) -> list[str]:
    """Every linear that is quantized, as the checkpoint spells it, without `.weight`."""
    return [
        name.removesuffix(".weight")
        for name in checkpoint
        if name.startswith("model.layers.")
        and name.endswith(".weight")
        and name.split(".")[-2] in LINEARS
    ]


def choose_group_size(checkpoint: Checkpoint, wanted: int) -> int:
    """`wanted`, or for 0 the largest that fits every linear; ValueError names those that fit."""
    if wanted not in (0, *GROUP_SIZES):
        choices = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"--group-size is {wanted}; it must be {choices}, or 0 for the largest")
    shapes = {name: checkpoint.info(f"{name}.weight").shape for name in linear_names(checkpoint)}
    if not shapes:
        raise ValueError(f"{checkpoint.folder} has no linears of a Mistral or Llama model")
    for name, (num_out, _) in shapes.items():
        if num_out % PACK:
            raise ValueError(f"{name} has {num_out} outputs; 4-bit packing takes multiples of 8")
    widths = {shape[1] for shape in shapes.values()}
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    if wanted in fitting:
        return wanted
    if not fitting:
        name, (_, width) = next(
            (name, shape) for name, shape in shapes.items() if shape[1] % GROUP_SIZES[-1]
        )
        raise ValueError(
            f"{name} has {width} inputs, which no group size divides "
            f"({', '.join(map(str, GROUP_SIZES))}); this model cannot be quantized"
        )
    if not wanted:
        return fitting[0]
    misfits = [name for name, shape in shapes.items() if shape[1] % wanted]
    width = shapes[misfits[0]][1]
    raise ValueError(
        f"--group-size is {wanted}, which does not divide the {width} inputs of {misfits[0]} "
        f"({len(misfits)} of {len(shapes)} linears); what fits is "
        f"{' or '.join(map(str, fitting))}"
    )
